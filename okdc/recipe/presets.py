"""Presets: the recipe that a run begins with where nobody named one; each is a shipped one, presets/NAME-METHOD."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from okdc.errors import RecipeError, nearest
from okdc.recipe.recipe import OF_TASK, apply_sets, names
from okdc.recipe.sections import FIGURES, DataSettings

FINETUNE, SCRATCH = "finetune", "scratch"
PRESETS = (FINETUNE, SCRATCH)
_BY_NAME = ("torch", "hfds", "hfids", "wds", "tfds")  # what `--data` may have before a slash, and is no folder then

# Whoever names one of these has a training in mind, and gets it.
_DECIDING = ("method", "pretrained", "checkpoint", "epochs", "lr", "lr_base")


def refuse_preset(preset: str, recipe: object) -> None:
    """RecipeError for a preset that there is not, or beside a `recipe`, which decides the same settings."""
    if preset not in PRESETS:
        raise RecipeError(f"no preset {preset!r}; expected {' or '.join(PRESETS)}.{nearest(preset, PRESETS)}")
    if recipe is not None:
        raise RecipeError(
            f"a preset ({preset}) and a recipe ({recipe}) decide the same settings: leave one of them out."
        )


def preset_recipe(preset: str) -> str:
    """The name of the recipe that a preset is."""
    return next(name for name in names() if name.startswith(f"presets/{preset}-"))


def own_path(data: str) -> Path | None:
    """The folder or file that `--data` names; None where it is a data set known by its name."""
    by_name = "/" in data and data.partition("/")[0].lower() in _BY_NAME
    return None if by_name or data in (DataSettings().data, FIGURES) else Path(data).expanduser()


def default_preset(flat: Mapping[str, Any], sets: Iterable[str]) -> tuple[str | None, list[str]]:
    """The preset of a run without a recipe, and the settings for which it has none though its images are the user's.

    FINETUNE for a folder of images or a table of their paths, unless what is typed (`flat`, `sets`) already says how to
    train.
    """
    sections = apply_sets({}, sets)
    typed = {key: value for section in sections.values() for key, value in section.items()}
    typed |= {key: value for key, value in flat.items() if value is not None}
    data = str(typed.get("data") or DataSettings().data)
    if typed.get("task") in OF_TASK or own_path(data) is None or data.lower().endswith(".npz"):
        return None, []
    if "name" in sections.get("method", {}):
        typed["method"] = sections["method"]["name"]
    named = [key for key in _DECIDING if key in typed]
    return (None, named) if named else (FINETUNE, [])
