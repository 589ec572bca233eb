"""What a command does before torch is imported, which takes seconds: say that it began, refuse what is not there."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from okdc import __version__, recipe
from okdc.errors import DataError, RecipeError
from okdc.system import saying


def announce(what: object) -> None:
    """The first line of a command that takes long; the processes of a distributed run leave it to their parent."""
    if "RANK" not in os.environ:
        saying.say(f"okdc {__version__} · reading {what}")


def refuse_missing(data: str) -> None:
    """DataError for a folder or file that is not there; what is known by its name is looked up later."""
    path = recipe.own_path(data)
    if path is None or path.exists() or "://" in data:
        return
    found = next(parent for parent in path.absolute().parents if parent.is_dir())
    near: list[str] = []
    if found == path.absolute().parent and os.access(found, os.R_OK):
        near = difflib.get_close_matches(path.name, os.listdir(found), n=2, cutoff=0.7)
    if near:
        raise DataError(f"--data '{data}' does not exist. Did you mean {' or '.join(near)}?")
    raise DataError(
        f"--data '{data}' does not exist ('{found}' does); expected a folder of images, a file of labels, or the name "
        "of a data set. okdc compress --help lists the forms."
    )


def choose_preset(
    preset: str | None, recipe_name: object, flat: Mapping[str, Any], sets: Sequence[str], resume: str | None
) -> str | None:
    """The preset that was typed, or that images of the user's have by default; says where what was typed keeps it off.

    A run that is continued by its PATH has its recipe. RecipeError for a preset beside a recipe.
    """
    going_on = resume not in (None, "auto")
    if preset is not None:
        if going_on:
            raise RecipeError(f"--preset {preset} with --resume {resume}: that run has its settings. Leave it out.")
        recipe.refuse_preset(preset, recipe_name)
        return preset
    if recipe_name is not None or going_on:
        return None
    preset, named = recipe.default_preset(flat, sets)
    if named and not {"method", "pretrained", "checkpoint"} & set(named) and "RANK" not in os.environ:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in named)
        saying.say(
            f"You gave {flags}, so nothing else is preset: the rest is at its default.\n"
            f"--preset {recipe.FINETUNE} begins from pre-trained weights, and keeps what you gave."
        )
    return preset
