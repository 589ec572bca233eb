"""The trained network that a method copies: found by its name, taken only if it knows the data's classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from okdc import networks, tasks
from okdc.data import Data
from okdc.errors import NetworkError, RecipeError
from okdc.networks import weights
from okdc.pipeline import class_names, saved_classes
from okdc.recipe import CohortSettings, NetworkSettings, runs_code
from okdc.system.randomness import own_randomness
from okdc.system.saying import say
from okdc.system.waiting import limited
from okdc.tasks.task import Task

ENOUGH = 2000  # validation images to see whether a teacher knows anything


def check(cohort: CohortSettings, method: str, needed: bool) -> None:
    """RecipeError when a method that needs a teacher gets none, or a teacher is given to one that takes none."""
    if needed and cohort.teacher is None:
        raise RecipeError(
            f"{method} copies a trained network and was given none. Say which: --teacher runs/NAME (a run of okdc), a "
            "checkpoint that names its network, or the name of a network with pre-trained weights."
        )
    if cohort.teacher is not None and not needed:
        raise RecipeError(
            f"{method} takes no teacher. Leave out --teacher {cohort.teacher}, or use --method kd or sokd."
        )


def load(
    name: str, input_size: tuple[int, int, int], classes: int, model: str | None = None, task: Task | None = None
) -> nn.Module:
    """The network called `name`, with its own trained classifier; NetworkError unless that has `classes` outputs.

    `model` is what the user named as the target: a run whose network is that package.module:function may be a teacher.
    """
    try:
        network = networks.load(_settings(name, input_size[0]), classes if runs_code(name) else None, typed=[model])
    except NetworkError as error:
        if Path(name).exists() or name not in networks.names():
            raise
        raise NetworkError(
            f"--teacher {name}: no trained weights of that name can be had ({str(error).partition('. ')[0]}). Train it "
            f"first (okdc compress --method baseline --model {name}), then --teacher runs/NAME."
        ) from error
    outputs = networks.check_input(network, input_size, task).shape[1]
    if outputs != classes:
        raise NetworkError(
            f"the teacher {name} knows {outputs} classes and the network is to know {classes}. Train it on these "
            f"images first (okdc compress --method baseline --model NAME), then --teacher runs/NAME."
        )
    networks.refuse_probabilities(network, f"the teacher {name}", input_size, task or tasks.get())
    return network


def align(teacher: nn.Module, name: str, classes: Sequence[str], input_size: tuple[int, int, int]) -> None:
    """Put the teacher's outputs in the order of the data's `classes`, where it is known what its own are called.

    Its classifier's rows are what moves, so that it stays the network that it is. NetworkError where only some of the
    names are the same, or the order cannot be changed; names of another kind altogether are said and taken as they are.
    """
    theirs = saved_classes.names_of(teacher, name)
    if not theirs or not saved_classes.differ(theirs, classes):
        return
    told = class_names.difference(theirs, classes, "the teacher", "the data")
    if not set(theirs) & set(classes):
        _say(name, f"its classes have other names ({told}); they are taken in their order.")
        return
    if sorted(theirs) != sorted(classes):
        raise NetworkError(
            f"the teacher {name} knows other classes than the data have: {told}. Train it on these images first (okdc "
            "compress --method baseline --model NAME), or rename the folders of what is the same."
        )
    if not saved_classes.reorder(teacher, [theirs.index(each) for each in classes], input_size):
        raise NetworkError(
            f"the teacher {name} knows the same classes in another order: {told}. Its outputs cannot be put in the "
            "order of the data: give the data in the teacher's, with --class-map FILE."
        )
    _say(name, f"the same classes in another order ({told}); its outputs were put in that of the data.")


def _say(name: str, told: str) -> None:
    say(f"Teacher {name}: {told}")


def check_accuracy(
    teacher: nn.Module, name: str, data: Data, device: torch.device, timeout: float, task: Task | None = None
) -> None:
    """Say how the teacher does on the first validation images; NetworkError if that is no more than guessing.

    Classes in another order, or images prepared in another way, have no other sign than a student that learns nothing.
    DataError where a batch takes more than `timeout` seconds.
    """
    task = task or tasks.get()
    scorer = task.scorer(len(data.classes))
    batches = limited(
        data.validation or (), timeout, lambda count: f"while the teacher looked at validation batch {count + 1}"
    )
    teacher.eval().to(device)
    with own_randomness(), torch.no_grad():
        for images, labels in batches:
            scorer.update(task.result(teacher(images.to(device))), labels.to(device))
            if scorer.images >= ENOUGH:
                break
    if not scorer.images:
        return
    share, chance = scorer.value()[task.metric] / 100, task.guessing(scorer.counts())
    if share <= chance + 2 * math.sqrt(chance * (1 - chance) / scorer.images):
        raise NetworkError(
            f"the teacher {name} is right on {share:.1%} of {scorer.images:,} validation images, and guessing would be "
            f"on {chance:.1%}: it knows other classes, or the same in another order, or images prepared in another "
            "way. Train it on these images first (okdc compress --method baseline --model NAME), then --teacher "
            "runs/NAME."
        )
    _say(name, f"{task.word} {share:.2%} of {scorer.images:,} validation images.")


def _settings(name: str, in_chans: int) -> NetworkSettings:
    if not Path(name).is_file():
        return NetworkSettings(model=name, in_chans=in_chans, pretrained=not Path(name).exists())
    arch = weights.architecture(name)
    if arch is None or runs_code(arch):
        raise NetworkError(
            f"the teacher {name} does not say which network of timm or torchvision it holds (its name under 'arch', "
            "beside weights that can be read without running code). Give the folder of the run or bundle (--teacher "
            "runs/NAME), or a function of yours that loads it (--teacher package.module:function)."
        )
    return NetworkSettings(model=arch, in_chans=in_chans, checkpoint=name)
