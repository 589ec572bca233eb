"""torchvision's image classifiers by name, with what timm's have and they lack: an input size, a preprocessing."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn

from okdc.recipe import NetworkSettings

PREFIX = "torchvision/"


def names() -> list[str]:
    """torchvision's image classifiers, without the prefix."""
    return torchvision.models.list_models(module=torchvision.models)


def build(settings: NetworkSettings) -> nn.Module:
    """The network that `settings.model` names, with its own number of classes and one tensor of logits as output."""
    kwargs = arguments(settings)
    if settings.pretrained:  # torchvision decides on these: its weights have the auxiliary classifiers
        kwargs = {key: value for key, value in kwargs.items() if key not in ("aux_logits", "init_weights")}
    name = settings.model.removeprefix(PREFIX)
    fetches = settings.pretrained and settings.checkpoint is None  # all that is fetched would be written over
    network = torchvision.models.get_model(name, weights="DEFAULT" if fetches else None, **kwargs)
    for auxiliary in ("aux1", "aux2", "AuxLogits"):  # with them forward returns a tuple
        if hasattr(network, auxiliary):
            setattr(network, auxiliary, None)
            network.aux_logits = False
    return network


def arguments(settings: NetworkSettings) -> dict[str, Any]:
    """What torchvision.models.get_model needs beside name and classes to make this network again, without weights."""
    name, found = settings.model.removeprefix(PREFIX), dict[str, Any]()
    own = data_config(settings.model) if settings.pretrained else None  # some weights are for a size of their own
    side = settings.img_size or (own["input_size"][-1] if own else None)
    if side and name.startswith("vit_"):
        found["image_size"] = side
    if side and name.startswith("maxvit"):
        found["input_size"] = (side, side)
    if name in ("googlenet", "inception_v3"):
        found |= {"aux_logits": False, "init_weights": True, "transform_input": settings.pretrained}
    return found | settings.model_kwargs


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
