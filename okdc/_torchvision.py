"""torchvision's image classifiers by name, with what timm's have and they lack: an input size, a preprocessing."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn

from okdc.settings import NetworkSettings

PREFIX = "torchvision/"


def names() -> list[str]:
    """torchvision's image classifiers, without the prefix."""
    return torchvision.models.list_models(module=torchvision.models)


def build(settings: NetworkSettings) -> nn.Module:
    """The network that `settings.model` names, with its own number of classes and one tensor of logits as output."""
    name = settings.model.removeprefix(PREFIX)
    kwargs = {**_arguments(name, settings), **settings.model_kwargs}
    network = torchvision.models.get_model(name, weights="DEFAULT" if settings.pretrained else None, **kwargs)
    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # GoogLeNet's and Inception's: with them forward returns a tuple
        if hasattr(network, auxiliary):
            setattr(network, auxiliary, None)
            network.aux_logits = False
    return network


def _arguments(name: str, settings: NetworkSettings) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if settings.img_size and name.startswith("vit_"):
        arguments["image_size"] = settings.img_size
    if settings.img_size and name.startswith("maxvit"):
        arguments["input_size"] = (settings.img_size, settings.img_size)
    if name in ("googlenet", "inception_v3") and not settings.pretrained:
        arguments["init_weights"] = True  # else torchvision warns that it may change its default
    return arguments


def data_config(model: str) -> dict[str, Any] | None:
    """The preprocessing of torchvision's default weights, in timm's words; None for a network from elsewhere."""
    name = model.removeprefix(PREFIX)
    if name == model:
        return None
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    side = preset.crop_size[0]
    return {
        "input_size": (3, side, side),
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
        "crop_pct": side / preset.resize_size[0],
    }
