"""Which classes are taken for which: counts of the images of each class by what they were named. C classes, B batch.

Of up to MOST classes the counts are (C, C): row the true class, column the named one. Of more, whose pairs would be
more numbers than a checkpoint should hold, they are (C, 2): wrong and right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MOST = 1000
PAIRS = 10  # of classes taken for one another, in a summary
WHOLE = 20  # classes up to which a summary holds the whole table


def columns(classes: int) -> int:
    """How many columns the counts of so many classes have."""
    return classes if classes <= MOST else 2


def cells(named: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The cell of the counts, row by row, that each image belongs to (B,): named and true class (B,)."""
    return labels * columns(classes) + (named if classes <= MOST else (named == labels).to(labels.dtype))


def _right(counts: Tensor) -> Tensor:
    return (counts.diagonal() if counts.shape[0] == counts.shape[1] else counts[:, 1]).double()


def recalls(counts: Tensor) -> Tensor:
    """Per cent of each class's images that were named rightly (C,); NaN for classes without images."""
    return 100 * _right(counts) / counts.sum(1)


def top1(counts: Tensor) -> float:
    """Per cent of all images that were named rightly.

    >>> top1(torch.tensor([[200, 0], [0, 0]]))
    100.0
    """
    return (100 * _right(counts).sum() / counts.sum()).item()


def balanced(counts: Tensor) -> float:
    """Balanced accuracy: the mean of the recalls of all classes that have images, per cent.

    >>> balanced(torch.tensor([[200, 0], [4, 0]]))  # always the large class: 98 % are right
    50.0
    """
    return recalls(counts).nanmean().item()


def summary(counts: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Recall of every class, the pairs confused most often, and the whole table of few classes, as plain values."""
    each = zip(names, counts.sum(1).tolist(), recalls(counts).tolist(), strict=True)
    square = counts.shape[0] == counts.shape[1]
    return {
        "classes": [{"name": name, "images": n, "recall": recall if n else None} for name, n, recall in each],
        "pairs": _pairs(counts, names) if square else None,
        "table": counts.tolist() if square and len(names) <= WHOLE else None,
        "always": names[int(counts.sum(0).argmax())] if square and (counts.sum(0) > 0).sum() == 1 else None,
    }


def _pairs(counts: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """The largest counts of images that were taken for another class, with their share of the true class, per cent."""
    wrong = counts.clone().fill_diagonal_(0).flatten()
    found = []
    for place in torch.argsort(wrong, descending=True, stable=True)[:PAIRS].tolist():
        true, named = divmod(place, len(names))
        if count := int(wrong[place]):
            share = 100 * count / int(counts[true].sum())
            found.append({"true": names[true], "named": names[named], "images": count, "share": share})
    return found
