"""What the classes of a saved network are called, and its classifier in the order of other data's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from okdc.anatomy import inspect
from okdc.anatomy.modes import keep_modes
from okdc.networks import weights
from okdc.networks.saved import config_of
from okdc.pipeline import class_names, run_folder

log = logging.getLogger("okdc")


def names_of(network: nn.Module, name: str) -> list[str] | None:
    """What the outputs of a run, a checkpoint in its folder, a bundle or a network from a hub are called, if known."""
    place = Path(name.removeprefix("local-dir:"))
    folder = place.parent if place.is_file() else place
    if (config := config_of(folder)) is not None:
        found = config.get("label_names")
    elif run_folder.is_run(folder):
        found = (run_folder.read_student(folder) or {}).get("classes")
    else:
        found = None if place.exists() else (getattr(network, "pretrained_cfg", None) or {}).get("label_names")
    return [str(each) for each in found] if found else None


def differ(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether both are known by names, which are not the same ones in the same order."""
    return list(theirs) != list(ours) and class_names.known(theirs) and class_names.known(ours)


@torch.no_grad()
def reorder(network: nn.Module, order: list[int], input_size: tuple[int, int, int]) -> bool:
    """Let output i be what output `order[i]` was, by moving the classifier's rows; False where it is not."""
    weight = next(network.parameters())
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(weight)
    put_back = keep_modes(network)
    expected = network.eval()(images)[:, order]
    classifier = network.get_submodule(inspect(network, input_size).classifier)
    for parameter in classifier.parameters():
        if len(parameter) == len(order):
            parameter.copy_(parameter[order])
    found = network(images)
    put_back()
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def start(target: nn.Module, name: str, classes: Sequence[str], input_size: tuple[int, int, int]) -> None:
    """Let a target that starts from the saved network `name` know the data's `classes` by their names, and say so.

    Where only some names are the same, it has a new classifier, as with another number of classes; where none are, the
    rows of the old one are taken as they are.
    """
    theirs = names_of(target, name)
    if not theirs or len(theirs) != len(classes) or not differ(theirs, classes):
        return
    told = class_names.difference(theirs, classes, "the saved network", "the data")
    if not set(theirs) & set(classes):
        log.warning("%s: its classes have other names (%s); its classifier is kept as it is", name, told)
    elif sorted(theirs) == sorted(classes) and reorder(target, [theirs.index(each) for each in classes], input_size):
        log.warning("%s: its classes in another order (%s); its classifier was put in that of the data", name, told)
    else:
        weights.reset_classifier(target, len(classes), weights.classifier_names(target, input_size))
        log.warning("%s: its classes are not those of the data (%s); it gets a new classifier", name, told)
