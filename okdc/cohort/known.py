"""What a proof found, and a digest of all that it depends on, by which an equal cohort can trust it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from okdc.cohort.replay import Tape

PACKAGES = ("torch", "torchvision", "timm")  # and okdc: whose code is the same where their versions are

Found = dict[str, tuple[bool, ...]]  # how the output of each module of the trunks is handled, as in `Handling`
Known = Callable[[str, Callable[[], Found]], Found]  # by a digest, what the proof has found; or as it is made now


def has_versions(network: nn.Module) -> bool:
    """Whether all modules are of packages whose version says what they do."""
    return all(type(module).__module__.partition(".")[0] in (*PACKAGES, "okdc") for module in network.modules())


def proved(
    known: Known, prove: Callable[[], None], tape: Tape, target: nn.Module, trunks: Mapping[str, Any],
    example: Tensor, *settings: object,
) -> tuple[str, Found]:  # fmt: skip
    """Take over what is known of an equal proof, or have it made, into the tape; the digest, and what was found."""

    def find() -> Found:
        prove()
        return {name: astuple(handling) for name, handling in tape.handling.items()}

    cuts = {cut: list(trunk) for cut, trunk in trunks.items()}
    by = digest(target, example, cuts, *settings)
    found = known(by, find)
    for name, handling in found.items():
        tape.handling[name].add(*handling)
    return by, found


def digest(target: nn.Module, example: Tensor, *settings: object) -> str:
    """Of software, kind of device, what the proof was asked for, structure, weights, buffers and example."""
    told = hashlib.blake2b(digest_size=16)
    software = [platform.python_version(), *map(version, PACKAGES), *_sources()]
    told.update(repr((software, example.device.type, settings, list(_structure(target)))).encode())
    for name, tensor in chain([("", example)], target.named_parameters(), target.named_buffers()):
        told.update(repr((name, tensor.dtype, tuple(tensor.shape), tensor.requires_grad)).encode())
        told.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return told.hexdigest()


def _sources() -> Iterator[str]:
    """Of the parts of okdc that prove: their version stays while somebody works on them."""
    for part in ("anatomy", "cohort"):
        for path in sorted((Path(__file__).parents[1] / part).glob("*.py")):
            yield hashlib.blake2b(path.read_bytes()).hexdigest()


def _structure(target: nn.Module) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each module, its class, and those of its attributes that are plain values: modes, strides, rates."""
    plain = (bool, int, float, str, tuple, type(None))
    for name, module in target.named_modules():
        values = {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        yield name, f"{type(module).__module__}.{type(module).__qualname__}", values
