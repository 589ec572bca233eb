"""The trained network that an offline method copies: found by its name, taken only if it knows the data's classes."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from okdc import checkpoint, networks
from okdc.errors import NetworkError, RecipeError
from okdc.recipe import CohortSettings, NetworkSettings, runs_code


def check(cohort: CohortSettings, method: str, needed: bool) -> None:
    """RecipeError when a method that needs a teacher gets none, or a teacher is given to one that takes none."""
    if needed and cohort.teacher is None:
        raise RecipeError(
            f"{method} copies a trained network and was given none. Say which: --teacher runs/NAME (a run of okdc), a "
            "checkpoint that names its network, or the name of a network with pre-trained weights."
        )
    if cohort.teacher is not None and not needed:
        raise RecipeError(f"{method} takes no teacher. Leave out --teacher {cohort.teacher}, or use --method kd.")


def load(name: str, input_size: tuple[int, int, int], classes: int) -> nn.Module:
    """The network called `name`, with its own trained classifier; NetworkError unless that has `classes` outputs."""
    network = networks.load(_settings(name, input_size[0]), classes if runs_code(name) else None)
    outputs = networks.check_input(network, input_size).shape[1]
    if outputs != classes:
        raise NetworkError(
            f"the teacher {name} knows {outputs} classes and the network is to know {classes}. Train it on these "
            f"images first (okdc compress --method baseline --model NAME), then --teacher runs/NAME."
        )
    return network


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
