"""The trained network that a method copies: found by its name, taken only if it knows the data's classes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from okdc import networks
from okdc.anatomy import inspect
from okdc.data import Data
from okdc.errors import NetworkError, RecipeError
from okdc.networks.saved import config_of
from okdc.pipeline import class_names, run_folder
from okdc.recipe import CohortSettings, NetworkSettings, runs_code
from okdc.system.randomness import own_randomness
from okdc.system.waiting import limited
from okdc.training import checkpoint

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


def load(name: str, input_size: tuple[int, int, int], classes: int, model: str | None = None) -> nn.Module:
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
    outputs = networks.check_input(network, input_size).shape[1]
    if outputs != classes:
        raise NetworkError(
            f"the teacher {name} knows {outputs} classes and the network is to know {classes}. Train it on these "
            f"images first (okdc compress --method baseline --model NAME), then --teacher runs/NAME."
        )
    return network


def align(teacher: nn.Module, name: str, classes: Sequence[str], input_size: tuple[int, int, int]) -> None:
    """Put the teacher's outputs in the order of the data's `classes`, where it is known what its own are called.

    Its classifier's rows are what moves, so that it stays the network that it is. NetworkError where only some of the
    names are the same, or the order cannot be changed; names of another kind altogether are said and taken as they are.
    """
    theirs = _class_names(teacher, name)
    if not theirs or theirs == list(classes) or not (class_names.known(theirs) and class_names.known(classes)):
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
    _reorder(teacher, name, [theirs.index(each) for each in classes], input_size, told)
    _say(name, f"the same classes in another order ({told}); its outputs were put in that of the data.")


def _class_names(teacher: nn.Module, name: str) -> list[str] | None:
    """What the outputs of a run, a checkpoint in its folder, a bundle or a network from a hub are called, if known."""
    place = Path(name.removeprefix("local-dir:"))
    folder = place.parent if place.is_file() else place
    if (config := config_of(folder)) is not None:
        found = config.get("label_names")
    elif run_folder.is_run(folder):
        found = (run_folder.read_student(folder) or {}).get("classes")
    else:
        found = (getattr(teacher, "pretrained_cfg", None) or {}).get("label_names")
    return [str(each) for each in found] if found else None


@torch.no_grad()
def _reorder(teacher: nn.Module, name: str, order: list[int], input_size: tuple[int, int, int], told: str) -> None:
    """Let output i be what output `order[i]` was, by moving the classifier's rows; NetworkError where it is not."""
    weight = next(teacher.parameters())
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(weight)
    expected = teacher.eval()(images)[:, order]
    classifier = teacher.get_submodule(inspect(teacher, input_size).classifier)
    for parameter in classifier.parameters():
        if len(parameter) == len(order):
            parameter.copy_(parameter[order])
    if not torch.allclose(teacher(images), expected, rtol=1e-4, atol=1e-5):
        raise NetworkError(
            f"the teacher {name} knows the same classes in another order: {told}. Its outputs cannot be put in the "
            "order of the data: give the data in the teacher's, with --class-map FILE."
        )


def _say(name: str, told: str) -> None:
    print(f"Teacher {name}: {told}", file=sys.stderr, flush=True)


def check_accuracy(teacher: nn.Module, name: str, data: Data, device: torch.device, timeout: float) -> None:
    """Say how the teacher does on the first validation images; NetworkError if that is no more than guessing.

    Classes in another order, or images prepared in another way, have no other sign than a student that learns nothing.
    DataError where a batch takes more than `timeout` seconds.
    """
    right = seen = 0
    batches = limited(
        data.validation or (), timeout, lambda count: f"while the teacher looked at validation batch {count + 1}"
    )
    teacher.eval().to(device)
    with own_randomness(), torch.no_grad():
        for images, labels in batches:
            right += int((teacher(images.to(device)).argmax(1) == labels.to(device)).sum())
            seen += len(labels)
            if seen >= ENOUGH:
                break
    if not seen:
        return
    share, chance = right / seen, 1 / len(data.classes)
    if share <= chance + 2 * math.sqrt(chance * (1 - chance) / seen):
        raise NetworkError(
            f"the teacher {name} is right on {share:.1%} of {seen:,} validation images, and guessing would be on "
            f"{chance:.1%}: it knows other classes, or the same in another order, or images prepared in another way. "
            "Train it on these images first (okdc compress --method baseline --model NAME), then --teacher runs/NAME."
        )
    _say(name, f"top-1 {share:.2%} of {seen:,} validation images.")


def _settings(name: str, in_chans: int) -> NetworkSettings:
    if not Path(name).is_file():
        return NetworkSettings(model=name, in_chans=in_chans, pretrained=not Path(name).exists())
    arch = checkpoint.load(name).get("arch")
    if not isinstance(arch, str) or runs_code(arch):
        raise NetworkError(
            f"the teacher {name} does not say which network of timm or torchvision it holds. Give the folder of the "
            "run that saved it: --teacher runs/NAME."
        )
    return NetworkSettings(model=arch, in_chans=in_chans, checkpoint=name)
