"""What a class of a method declares and what its losses give, held against what the loop can train."""

from __future__ import annotations

from difflib import get_close_matches
from inspect import getattr_static
from typing import TYPE_CHECKING

from torch import Tensor

from okdc.cohort.taps import checked
from okdc.errors import MethodError, nearest

if TYPE_CHECKING:
    from okdc.methods.shared.base import Method

CHOICES = {"share": ("trunk", "none"), "trunk_gradient": ("sum", "mean")}
ELSEWHERE = {  # what other frameworks call it
    "on_epoch_start": "begin_epoch", "on_train_epoch_start": "begin_epoch", "training_step": "forward",
    "configure_optimizers": "param_groups", "on_before_optimizer_step": "before_step",
    "on_train_batch_end": "after_step", "views": "needs", "pairs": "needs", "indices": "needs", "held_out": "needs",
}  # fmt: skip


def refuse_declared(kind: type[Method]) -> None:
    """MethodError for attributes of the class that have no such value."""
    try:
        checked(kind.taps)
    except MethodError as error:
        raise MethodError(f"{kind.__name__}: {error}") from error
    for name, known in CHOICES.items():
        if (given := getattr(kind, name)) not in known:
            raise MethodError(
                f"{kind.__name__}: {name} is {given!r}; expected {' or '.join(map(repr, known))}."
                f"{nearest(str(given), known)}"
            )
    if not isinstance(kind.members, int) or kind.members < 1:
        raise MethodError(
            f"{kind.__name__}: members is {kind.members!r}; expected a whole number of 1 or more, the target included."
        )
    if kind.clip_grad is not None and not (isinstance(kind.clip_grad, int | float) and kind.clip_grad > 0):
        raise MethodError(
            f"{kind.__name__}: clip_grad is {kind.clip_grad!r}; expected a number above 0, or None, for no clipping."
        )
    if not isinstance(getattr_static(kind, "needs"), classmethod):
        given = type(getattr_static(kind, "needs")).__name__
        raise MethodError(
            f"{kind.__name__}: needs is a {given}; expected a class method, because "
            "it is asked before there is a method: @classmethod, def needs(cls, **settings), return okdc.Needs(...)."
        )
    if isinstance(kind.tasks, str):
        raise MethodError(
            f"{kind.__name__}: tasks is the string {kind.tasks!r}; expected a tuple, even of one: ({kind.tasks!r},)."
        )


def misspelt(kind: type[Method]) -> list[str]:
    """Names that the class has and okdc never looks at, which are nearly those of attributes or hooks, in words."""
    base = next(each for each in kind.__mro__ if each.__module__ == "okdc.methods.shared.base")
    known = [name for name in vars(base) if not name.startswith("_")]
    found = []
    for own in kind.__mro__[: kind.__mro__.index(base)]:
        for name in vars(own).keys() - known:
            meant = ELSEWHERE.get(name) or next(iter(get_close_matches(name, known, 1, 0.85)), None)
            if meant and not name.startswith("_"):
                found.append(f"{kind.__name__}.{name} is nothing that okdc looks at. Did you mean {meant}?")
    return sorted(found)


def refuse_unwritten(kind: type[Method]) -> None:
    """MethodError for a class that says nothing of losses."""
    base = next(each for each in kind.__mro__ if each.__module__ == "okdc.methods.shared.base")
    if kind.losses is base.losses and kind.forward is base.forward:  # type: ignore[attr-defined]
        raise MethodError(
            f"{kind.__name__} has no losses: write `def losses(self, out, labels)`, which gives a dictionary of named "
            "scalars."
        )


def refuse_losses(kind: type[Method], found: object) -> dict[str, Tensor]:
    """What `losses` or `forward` gave; MethodError where that is no dictionary of named scalars with a gradient."""
    expected = 'expected a dictionary of named scalar tensors, such as {"ce": cross_entropy(out.logits[0], labels)}.'
    if not isinstance(found, dict):
        raise MethodError(f"the losses of {kind.__name__} are a {type(found).__name__}; {expected}")
    if not found:
        raise MethodError(f"the losses of {kind.__name__} are an empty dictionary; {expected}")
    for name, value in found.items():
        if not isinstance(name, str):
            raise MethodError(f"{kind.__name__} calls a loss {name!r}; expected a string, under which it is logged.")
        if not isinstance(value, Tensor):
            raise MethodError(
                f"the loss {name!r} of {kind.__name__} is a {type(value).__name__}, {value!r:.40}; expected a tensor. "
                "Leave out .item() and float(): the loop differentiates it."
            )
        if value.dim():
            raise MethodError(
                f"the loss {name!r} of {kind.__name__} has the shape {tuple(value.shape)}; expected a scalar: take "
                "its .mean() over the batch."
            )
    if not any(value.requires_grad for value in found.values()):
        raise MethodError(
            f"no loss of {kind.__name__} has a gradient ({', '.join(found)}): nothing could learn. Leave out .detach() "
            "and torch.no_grad() on the way from out.logits to the losses."
        )
    return found
