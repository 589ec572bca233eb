"""Networks like the target, from which members are made: copies of it, or newly made where its maker is known."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from okdc.errors import NetworkError


def copy_of(target: nn.Module) -> nn.Module:
    """A copy; NetworkError for a network that cannot be copied."""
    try:
        return copy.deepcopy(target)
    except Exception as error:
        raise NetworkError(
            f"{type(target).__name__} cannot be copied ({error}), and branches are copies of the target. Store only "
            "modules, leaf tensors and plain values on it, or give its name or factory instead of the object."
        ) from error


def sibling(target: nn.Module, fresh: Callable[[], nn.Module] | None) -> nn.Module:
    """Another network like the target: newly made where its maker is known, else a copy (to be redrawn)."""
    if fresh is None:
        return copy_of(target)
    network = fresh()
    made = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    wanted = {k: tuple(v.shape) for k, v in target.state_dict().items()}
    if made != wanted:
        key = next(k for k in {**wanted, **made} if made.get(k) != wanted.get(k))
        raise NetworkError(
            f"`fresh` makes another network than the target, {type(target).__name__}: {key} is "
            f"{made.get(key, 'missing')} in it, and {wanted.get(key, 'missing')} in the target. Give a function that "
            "makes the target anew, or leave it out: branches are then redrawn copies."
        )
    for mine, theirs in zip(network.parameters(), target.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return network.to(next(target.parameters()).device)
