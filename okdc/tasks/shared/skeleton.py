"""What a set of key points is: names, what connects them, which change sides in a mirror, how exact labels are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Pairs = tuple[tuple[int, int], ...]

SIGMA = 0.05  # of OKS, where nobody has measured any

COCO = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle"),
    "right_ankle",
)
COCO_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087),
    *(0.089, 0.089),
)


@dataclass(frozen=True)
class Skeleton:
    """K key points by name; `edges` and `pairs` are of their numbers, from 0.

    `pairs` are those that change places when an image is mirrored: empty where there are none, None where nobody said,
    and then no image may be mirrored. `sigmas` (K,) are those of object key-point similarity.
    """

    names: tuple[str, ...]
    edges: Pairs = ()
    pairs: Pairs | None = None
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.sigmas:
            known = COCO_SIGMAS if self.names == COCO else (SIGMA,) * len(self.names)
            object.__setattr__(self, "sigmas", known)
        if self.pairs is None and self.names == COCO:
            object.__setattr__(self, "pairs", paired_names(COCO))

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Skeleton:
        """From plain values, as `facts` gives them."""
        edges, pairs = (
            None if facts[key] is None else tuple((i, j) for i, j in facts[key]) for key in ("edges", "pairs")
        )
        return Skeleton(tuple(facts["names"]), edges or (), pairs, tuple(facts["sigmas"]))

    def facts(self) -> dict[str, Any]:
        """The same as plain values."""
        pairs = None if self.pairs is None else [list(pair) for pair in self.pairs]
        edges = [list(edge) for edge in self.edges]
        return {"names": list(self.names), "edges": edges, "pairs": pairs, "sigmas": list(self.sigmas)}

    def mirrored(self) -> list[int]:
        """Which key point stands in the place of each in a mirrored image, (K,); only where pairs are known."""
        order = list(range(len(self.names)))
        for one, other in self.pairs or ():
            order[one], order[other] = other, one
        return order


def paired_names(names: Sequence[str]) -> Pairs:
    """The pairs that names suggest, by a left and a right in them; whether a mirror swaps them only people know.

    >>> paired_names(["nose", "left_ear", "right_ear", "pawL"])
    ((1, 2),)
    """
    lower = [name.lower() for name in names]
    partner = {name: re.sub("left|right", lambda side: _OTHER[side[0]], name) for name in lower}
    found = ((i, lower.index(partner[name])) for i, name in enumerate(lower) if partner[name] in lower)
    return tuple((i, j) for i, j in found if i < j)


_OTHER = {"left": "right", "right": "left"}
