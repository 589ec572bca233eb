"""A preset that starts from pre-trained weights, where these can be had; from scratch where they cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from okdc import networks
from okdc.recipe import SCRATCH, Recipe, preset_recipe
from okdc.system.saying import say


def settle(preset: str, make: Callable[[str], Recipe], typed: Mapping[str, Any]) -> tuple[str, Recipe]:
    """The preset and the recipe that `make` makes of its name: those of SCRATCH, and why on stderr, without weights.

    Whoever `typed` pretrained or a checkpoint gets it, or the error that it is.
    """
    found = make(preset_recipe(preset))
    asked = typed.get("pretrained") is not None or found.network.checkpoint
    if asked or not found.network.pretrained:
        return preset, found
    say(f"Looking for pre-trained weights of {found.network.model}")
    reason = networks.lacks_weights(found.network)
    if reason is None:
        return preset, found
    batch, found = found.train.batch_size, make(preset_recipe(SCRATCH))
    found = replace(found, train=replace(found.train, batch_size=batch))  # small enough for a folder of photos
    say(f"{reason}.\nSo it learns from your images alone, for {found.train.epochs} epochs, as with --preset {SCRATCH}.")
    return SCRATCH, found
