"""What a class of a method declares, held against what there is, where the class is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from okdc.cohort.taps import checked
from okdc.errors import MethodError, nearest

if TYPE_CHECKING:
    from okdc.methods.shared.base import Method

CHOICES = {"share": ("trunk", "none"), "trunk_gradient": ("sum", "mean")}


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
    if isinstance(kind.tasks, str):
        raise MethodError(
            f"{kind.__name__}: tasks is the string {kind.tasks!r}; expected a tuple, even of one: ({kind.tasks!r},)."
        )
