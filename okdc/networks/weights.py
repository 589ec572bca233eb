"""Weights of any network: find its classifier, put another in its place, load a checkpoint strictly."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from okdc.anatomy import classifiers
from okdc.anatomy.calls import watch
from okdc.anatomy.classifier import stated
from okdc.errors import NetworkError, first_line

log = logging.getLogger("okdc")

_SHOWN = 3


def classifier_names(network: nn.Module, input_size: tuple[int, int, int] | None = None) -> list[str]:
    """Names of the layers that end in class scores, the one that counts first: what `okdc.anatomy.classifiers` finds.

    A network that states none is run on a black image of `input_size` (C, H, W) for the order of its calls; without a
    size, or where it does not run on that, its layers count in the order in which it has them.
    """
    if input_size is None or stated(network):
        return classifiers(network)
    weight = next(network.parameters(), torch.zeros(()))
    try:
        calls, logits = watch(network, weight.new_zeros(1, *input_size))
    except Exception:  # whatever a stranger's forward raises; `check_input` says it in words
        return classifiers(network)
    if not (isinstance(logits, Tensor) and logits.dim() == 2):
        return classifiers(network)
    return classifiers(network, calls, logits.shape[1])


def num_classes(network: nn.Module, names: Sequence[str] = ()) -> int | None:
    """The number of outputs of the network's classifier, the first of `names` if these are known; None without one."""
    found = names or classifier_names(network)
    return len(network.get_submodule(found[0]).weight) if found else None  # type: ignore[arg-type]


def reset_classifier(network: nn.Module, classes: int, names: Sequence[str] = ()) -> None:
    """Put a new classifier of `classes` outputs in place; raises NetworkError if the network has none."""
    if hasattr(network, "reset_classifier"):
        network.reset_classifier(classes)  # type: ignore[operator]
        return
    found = names or classifier_names(network)
    if not found:
        raise NetworkError(f"{type(network).__name__} has no linear layer or convolution that could be its classifier.")
    parent, _, child = found[0].rpartition(".")
    setattr(network.get_submodule(parent), child, _resized(network.get_submodule(found[0]), classes))
    if hasattr(network, "num_classes"):
        network.num_classes = classes  # type: ignore[assignment]


def _resized(old: nn.Module, classes: int) -> nn.Module:
    assert isinstance(old, (nn.Linear, nn.Conv2d))
    place: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype, "bias": old.bias is not None}
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, classes, **place).train(old.training)
    new = nn.Conv2d(old.in_channels, classes, old.kernel_size, old.stride, old.padding, **place)  # type: ignore[arg-type]
    return new.train(old.training)


def fits(network: nn.Module, path: str | Path, names: Sequence[str]) -> bool:
    """Whether a checkpoint's weights have the shapes of the network's, whatever the classifiers `names` give."""
    heads = tuple(f"{name}." for name in names)
    return not [d for d in _differences(network.state_dict(), _read(Path(path), network)[0]) if not d.startswith(heads)]


def load(network: nn.Module, path: str | Path, names: Sequence[str]) -> None:
    """Load a checkpoint of timm, okdc or torch; the classifiers `names` take the checkpoint's number of classes.

    What a wrapper put before all names alike (Lightning's `model.`) is left out, and said. Never runs code that is in
    the file. Raises NetworkError if it is not there, not readable, or of another network.
    """
    state, wrapper = _read(Path(path), network)
    if wrapper:
        log.warning("%s: its weights are those of %s, without %s", path, type(network).__name__, wrapper)
    for name in names:
        rows = state.get(f"{name}.weight")
        if rows is not None and rows.dim() and len(rows) != num_classes(network, names):
            reset_classifier(network, len(rows), names)
    differences = _differences(network.state_dict(), state)
    if differences:
        arch = architecture(path)
        more = f"; and {len(differences) - _SHOWN} more" if differences[_SHOWN:] else ""
        raise NetworkError(
            f"{path} is not a checkpoint of this network ({type(network).__name__}): "
            f"{'; '.join(differences[:_SHOWN])}{more}. "
            f"Give the network that it was saved from{f' ({arch})' if arch else ''} with --model, "
            "or another file with --checkpoint."
        )
    network.load_state_dict(state)


def _read(path: Path, network: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The weights that a checkpoint holds, and what had to be left out for the network's own names, in words."""
    if not path.is_file():
        raise NetworkError(f"no checkpoint {path}: --checkpoint takes a .pth, .pth.tar or .safetensors file.")
    try:
        state = timm.models.load_state_dict(str(path))
    except Exception as error:  # a damaged file fails in as many ways as there are formats
        raise NetworkError(
            f"{path} is not a readable checkpoint of weights alone: {first_line(error)} "
            "Save it again with torch.save(network.state_dict(), FILE)."
        ) from error
    own, left_out = network.state_dict().keys(), ""
    if not _is_state(state):
        held = [key for key, value in state.items() if _is_state(value) and _wrapper(value, own) is not None]
        if len(held) != 1:
            several = f", but {' and '.join(map(str, held))}, each of which may be meant" if held else ""
            raise NetworkError(
                f"{path} holds no one state_dict of this network ({type(network).__name__}){several}. "
                "Save the one with torch.save(network.state_dict(), FILE)."
            )
        state, left_out = state[held[0]], f"the {held[0]!r} around them"
    if wrapper := _wrapper(state, own):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
        left_out += f"{' and ' if left_out else ''}the {wrapper!r} before their names"
    return state, left_out


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _wrapper(given: Collection[str], own: Collection[str]) -> str | None:
    """What stands before the network's `own` names in all of those `given`, maybe nothing; None where others do."""
    longer = max(map(len, given), default=0) - max(map(len, own), default=0)
    found = next(iter(given), "")[: max(longer, 0)]
    return found if {found + key for key in own} == set(given) else None


def _differences(own: dict[str, Tensor], given: dict[str, Tensor]) -> list[str]:
    """What differs between two state dicts, in the network's own order, then what is left over."""
    found = []
    for key, value in own.items():
        if key not in given:
            found.append(f"{key} is missing")
        elif given[key].shape != value.shape:
            found.append(f"{key} is {tuple(given[key].shape)}, expected {tuple(value.shape)}")
    return found + [f"{key} is unknown" for key in given if key not in own]


def architecture(path: str | Path) -> str | None:
    """The name of the network that a checkpoint is of, where it says that, as timm's and okdc's do."""
    try:
        name = torch.load(path, map_location="cpu", weights_only=True).get("arch")
    except Exception:  # whatever it is instead does not say so
        return None
    return name if isinstance(name, str) else None
