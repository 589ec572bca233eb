"""Classes by their names: the same number of classes says nothing of which is which."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 4  # names of each side in a message


def known(names: Sequence[str]) -> bool:
    """Whether they are names, and not the numbers that stand for classes whose names nobody has said."""
    return list(names) != [str(number) for number in range(len(names))]


def difference(theirs: Sequence[str], ours: Sequence[str], they: str, we: str) -> str:
    """How two lists of classes differ, in words: names that only one of them has, or else the first in another place.

    >>> difference(["cat", "dog"], ["cat", "fox"], "the run", "the data")
    "'dog' only in the run; 'fox' only in the data"
    >>> difference(["cat", "dog"], ["dog", "cat"], "the run", "the data")
    "number 0 is 'cat' in the run and 'dog' in the data"
    """
    sides = [(they, [name for name in theirs if name not in set(ours)])]
    sides += [(we, [name for name in ours if name not in set(theirs)])]
    if any(names for _, names in sides):
        return "; ".join(f"{_listed(names)} only in {side}" for side, names in sides if names)
    place = next(i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b)
    return f"number {place} is {theirs[place]!r} in {they} and {ours[place]!r} in {we}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
