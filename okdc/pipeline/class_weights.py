"""How much each class counts in the cross-entropy with labels: by how rare it is, or as a file says."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from okdc.data import Data
from okdc.errors import DataError, RecipeError, refuse_address
from okdc.pipeline import class_names
from okdc.recipe import Recipe, runs_code
from okdc.training.machine import choose_device

log = logging.getLogger("okdc")


def of(recipe: Recipe, data: Data) -> Tensor | None:
    """The weights (C,) that --class-weights asks for, on the device that trains; None where it asks for none.

    RecipeError for a file that does not give a weight to each class, DataError where the labels are not known.
    """
    asked = recipe.train.class_weights
    if asked is None:
        return None
    if runs_code(recipe.method["name"]):
        log.warning("--class-weights acts in okdc.losses.cross_entropy alone: %s must use it", recipe.method["name"])
    if asked == "auto" and recipe.data.balanced_sampling:
        log.warning(
            "--class-weights auto and --balanced-sampling both make up for classes of uneven size: together they weigh "
            "rare classes twice. One of them is enough."
        )
    weights = rarity(data) if asked == "auto" else _read(asked, data.classes)
    return weights.to(choose_device(recipe.train.device))


def rarity(data: Data) -> Tensor:
    """Weights (C,) in inverse proportion to the number of training images, whose mean over these images is 1."""
    if data.train_labels is None:
        raise DataError(
            f"--class-weights auto counts the training images of each class, which {data.name} does not say before "
            "they are read. Give the weights: --class-weights FILE, a line CLASS WEIGHT for each."
        )
    counts = data.train_labels.bincount(minlength=len(data.classes)).float()
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp_min(1)), 0.0)


def _read(given: str, classes: Sequence[str]) -> Tensor:
    refuse_address(given, "--class-weights")
    file = Path(given)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"--class-weights {file} cannot be read ({error}): expected auto, or a file of lines CLASS WEIGHT."
        ) from error
    parsed = [_parsed(file, line) for line in lines if line.strip()]
    weights = dict(parsed)
    if len(weights) < len(parsed):
        raise RecipeError(f"--class-weights {file} weighs a class twice: leave one of the lines out.")
    if set(weights) != set(classes):
        told = class_names.difference(list(weights), classes, "the file", "the data")
        raise RecipeError(f"--class-weights {file} must weigh each class of the data: {told}.")
    if not any(weights.values()):
        raise RecipeError(f"--class-weights {file} has no weight above 0: nothing would be learned from labels.")
    return torch.tensor([weights[name] for name in classes])


def _parsed(file: Path, line: str) -> tuple[str, float]:
    name, _, number = line.strip().replace("\t", " ").rpartition(" ")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name.strip() or not 0 <= weight < math.inf:
        raise RecipeError(f"--class-weights {file}: expected CLASS WEIGHT, a weight of 0 or more, got {line!r}.")
    return name.strip(), weight
