"""Weights of any network: find its classifier, put another in its place, load a checkpoint strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from okdc.errors import NetworkError, first_line

_SHOWN = 3


def classifier_names(network: nn.Module) -> list[str]:
    """Names of the modules that end in class scores: timm's statement, else the last linear layer or convolution."""
    stated = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    stated = [stated] if isinstance(stated, str) else list(stated)
    modules = dict(network.named_modules())
    known = [name for name in stated if isinstance(modules.get(name), (nn.Linear, nn.Conv2d))]
    return known or [name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv2d))][-1:]


def num_classes(network: nn.Module) -> int | None:
    """The number of outputs of the network's classifier; None if it has none."""
    found = classifier_names(network)
    if not found:
        return None
    return len(network.get_submodule(found[0]).weight)  # type: ignore[arg-type]


def reset_classifier(network: nn.Module, classes: int) -> None:
    """Put a new classifier of `classes` outputs in place; raises NetworkError if the network has none."""
    if hasattr(network, "reset_classifier"):
        network.reset_classifier(classes)  # type: ignore[operator]
        return
    found = classifier_names(network)
    if not found:
        raise NetworkError(f"{type(network).__name__} has no linear layer or convolution that could be its classifier.")
    parent, _, child = found[-1].rpartition(".")
    setattr(network.get_submodule(parent), child, _resized(network.get_submodule(found[-1]), classes))
    if hasattr(network, "num_classes"):
        network.num_classes = classes  # type: ignore[assignment]


def _resized(old: nn.Module, classes: int) -> nn.Module:
    assert isinstance(old, (nn.Linear, nn.Conv2d))
    place: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype, "bias": old.bias is not None}
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, classes, **place).train(old.training)
    new = nn.Conv2d(old.in_channels, classes, old.kernel_size, old.stride, old.padding, **place)  # type: ignore[arg-type]
    return new.train(old.training)


def fits(network: nn.Module, path: str | Path) -> bool:
    """Whether a checkpoint's weights have the shapes of the network's, whatever its number of classes."""
    heads = tuple(f"{name}." for name in classifier_names(network))
    return not [d for d in _differences(network.state_dict(), _read(Path(path))) if not d.startswith(heads)]


def load(network: nn.Module, path: str | Path) -> None:
    """Load a checkpoint of timm, okdc or torch; the classifier takes the checkpoint's number of classes.

    Never runs code that is in the file. Raises NetworkError if it is not there, not readable, or of another network.
    """
    state = _read(Path(path))
    for name in classifier_names(network):
        rows = state.get(f"{name}.weight")
        if rows is not None and rows.dim() and len(rows) != num_classes(network):
            reset_classifier(network, len(rows))
    differences = _differences(network.state_dict(), state)
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if differences[_SHOWN:] else ""
        raise NetworkError(
            f"{path} is not a checkpoint of this network ({type(network).__name__}): "
            f"{'; '.join(differences[:_SHOWN])}{more}. "
            f"Give the network that it was saved from{_architecture(Path(path))} with --model, "
            "or another file with --checkpoint."
        )
    network.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise NetworkError(f"no checkpoint {path}: --checkpoint takes a .pth, .pth.tar or .safetensors file.")
    try:
        state = timm.models.load_state_dict(str(path))
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        raise NetworkError(
            f"{path} is not a readable checkpoint of weights alone: {first_line(error)} "
            "Save it again with torch.save(network.state_dict(), FILE)."
        ) from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise NetworkError(f"{path} holds no state_dict. Save one with torch.save(network.state_dict(), FILE).")
    return state


def _differences(own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """What differs between two state dicts, in the network's own order, then what is left over."""
    found = []
    for key, value in own.items():
        if key not in given:
            found.append(f"{key} is missing")
        elif given[key].shape != value.shape:
            found.append(f"{key} is {tuple(given[key].shape)}, expected {tuple(value.shape)}")
    return found + [f"{key} is unknown" for key in given if key not in own]


def _architecture(path: Path) -> str:
    """` (name)` if the checkpoint says which network it is of, as timm's and okdc's do."""
    try:
        name = torch.load(path, map_location="cpu", weights_only=True).get("arch")
    except Exception:  # only asked for to make a message better
        return ""
    return f" ({name})" if isinstance(name, str) else ""
