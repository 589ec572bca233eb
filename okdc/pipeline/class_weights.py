"""How much each class counts in the loss with labels: by how rare it is, or as a file says."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from okdc import tasks
from okdc.data import Data
from okdc.errors import DataError, RecipeError, refuse_address
from okdc.pipeline import class_names
from okdc.recipe import Recipe, runs_code
from okdc.tasks.task import Task
from okdc.training.machine import choose_device

log = logging.getLogger("okdc")


def of(recipe: Recipe, data: Data) -> Tensor | None:
    """The weights (C,) that --class-weights asks for (--pos-weight, of several labels), on the device that trains.

    None where nothing is asked for. RecipeError for a file that does not give a weight to each class, DataError where
    the labels are not known.
    """
    task = tasks.get(recipe.network.task)
    asked, flag = getattr(recipe.train, task.weighing), f"--{task.weighing.replace('_', '-')}"
    if asked is None:
        return None
    if runs_code(recipe.method["name"]):
        log.warning("%s acts in okdc.losses.%s alone: %s must use it", flag, task.loss, recipe.method["name"])
    if asked == "auto" and recipe.data.balanced_sampling:
        log.warning(
            "--class-weights auto and --balanced-sampling both make up for classes of uneven size: together they weigh "
            "rare classes twice. One of them is enough."
        )
    weights = _counted(data, task, flag) if asked == "auto" else _read(asked, data.classes, flag)
    return weights.to(choose_device(recipe.train.device))


def _counted(data: Data, task: Task, flag: str) -> Tensor:
    """The weights (C,) that the task makes of the labels of the training images."""
    if data.train_labels is None:
        raise DataError(
            f"{flag} auto counts the training images of each class, which {data.name} does not say before they are "
            f"read. Give the weights: {flag} FILE, a line CLASS WEIGHT for each."
        )
    return task.weights(data.train_labels, len(data.classes))


def _read(given: str, classes: Sequence[str], flag: str) -> Tensor:
    refuse_address(given, flag)
    file = Path(given)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{flag} {file} cannot be read ({error}): expected auto, or a file of lines CLASS WEIGHT."
        ) from error
    parsed = [_parsed(file, line, flag) for line in lines if line.strip()]
    weights = dict(parsed)
    if len(weights) < len(parsed):
        raise RecipeError(f"{flag} {file} weighs a class twice: leave one of the lines out.")
    if set(weights) != set(classes):
        told = class_names.difference(list(weights), classes, "the file", "the data")
        raise RecipeError(f"{flag} {file} must weigh each class of the data: {told}.")
    if not any(weights.values()):
        raise RecipeError(f"{flag} {file} has no weight above 0: nothing would be learned from labels.")
    return torch.tensor([weights[name] for name in classes])


def _parsed(file: Path, line: str, flag: str) -> tuple[str, float]:
    name, _, number = line.strip().replace("\t", " ").rpartition(" ")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name.strip() or not 0 <= weight < math.inf:
        raise RecipeError(f"{flag} {file}: expected CLASS WEIGHT, a weight of 0 or more, got {line!r}.")
    return name.strip(), weight
