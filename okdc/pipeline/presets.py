"""A preset that starts from pre-trained weights, where these can be had; from scratch, or not at all, where not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import timm

from okdc import networks, tasks
from okdc.data import open_source
from okdc.errors import NetworkError, counted
from okdc.pipeline.facts import command
from okdc.pipeline.forecast import about, forecast
from okdc.recipe import FINETUNE, LOADER, SCRATCH, Recipe, preset_recipe
from okdc.system.saying import say

ENOUGH = 1000  # images, from which on a network is trained from random weights without being asked to


def settle(preset: str, make: Callable[[str], Recipe], typed: Mapping[str, Any]) -> tuple[str, Recipe]:
    """The preset and the recipe that `make` makes of its name: those of SCRATCH, and why on stderr, without weights.

    NetworkError, with the commands to type, where there are fewer than ENOUGH images to learn from instead. Whoever
    `typed` pretrained or a checkpoint gets it, or the error that it is.
    """
    found = make(preset_recipe(preset))
    asked = typed.get("pretrained") is not None or found.network.checkpoint
    if asked or not found.network.pretrained:
        return preset, found
    say(f"Looking for pre-trained weights of {found.network.model}")
    reason = networks.lacks_weights(found.network)
    if reason is None:
        return preset, found
    batch, model, found = found.train.batch_size, found.network.model, make(preset_recipe(SCRATCH))
    found = replace(found, train=replace(found.train, batch_size=batch))  # small enough for a folder of photos
    images = _images(found)
    if images is not None and images < ENOUGH:
        raise NetworkError(_too_few(images, model, reason, found))
    say(f"{reason}.\nSo it learns from your images alone, for {found.train.epochs} epochs, as with --preset {SCRATCH}.")
    return SCRATCH, found


def _images(recipe: Recipe) -> int | None:
    """How many images there are to learn from; None for a stream and a loader. DataError for what cannot be read."""
    if recipe.data.data == LOADER:
        return None
    source = open_source(recipe.data, recipe.train.seed, tasks.get(recipe.network.task))
    return len(source.train) if hasattr(source.train, "__len__") else None


def _too_few(images: int, model: str, reason: str, scratch: Recipe) -> str:
    """Why nothing is trained, and what to type instead."""
    given, found = command().replace(f" --preset {FINETUNE}", ""), forecast(scratch, control=False)
    again = given if given.startswith("okdc ") else f"okdc compress --data {scratch.data.data} --model {model}"
    file = f"{model.rpartition('/')[2]}.pth"
    takes = f"takes about {about(found.seconds)}" if found else "may take long"
    lines = [
        f"{reason}. Without them the network would know nothing but your {counted(images, 'image')}, which are too few "
        "to learn much from. Nothing was trained."
    ]
    if timm.is_model(model) and timm.models.is_model_pretrained(model):
        lines += [
            "Type the same again where there is a connection. Or fetch the weights on a machine that has one:",
            f"  python -c \"import timm, torch; torch.save(timm.create_model('{model}', pretrained=True).state_dict(), "
            f"'{file}')\"",
            "and begin from that file:",
        ]
    else:
        lines += ["Name another network, such as --model resnet18. Or begin from a file with weights of this one:"]
        file = "FILE"
    lines += [
        f"  {again} --preset {FINETUNE} --checkpoint {file}",
        f"Or train from random weights, which {takes} on this CPU. It usually ends far less accurate:",
        f"  {again} --preset {SCRATCH}",
    ]
    return "\n".join(lines)
