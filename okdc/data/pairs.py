"""A class-balanced order: every class that occurs in a batch occurs there as often as the others, twice at least."""

from __future__ import annotations

import torch
from torch import Tensor

from okdc.errors import DataError

NUMBERS = 2**22  # drawn at a time: what 14 million images of 21,841 classes take at once would be more than a gigabyte


def images_per_class(labels: Tensor, batch_size: int) -> int:
    """The fewest images (2 or more) of each class that fill a batch evenly; DataError where only one class would.

    Ten classes and a batch of 128 take 16 of each of 8 classes; a hundred take 2 of each of 64.
    """
    classes = len(labels.unique())
    for count in range(2, batch_size):
        if batch_size % count == 0 and batch_size // count <= classes:
            return count
    raise DataError(
        f"the method compares images of one class with images of others, so a batch is divided into two images or more "
        f"of each of some classes, and {batch_size} images of {classes} classes cannot be. Choose a --batch-size that "
        f"can, such as -b {max(4, batch_size + batch_size % 2)}."
    )


def paired_order(labels: Tensor, batch_size: int, count: int, generator: torch.Generator) -> Tensor:
    """Positions (N - N mod B,): each batch draws B / `count` classes, then `count` images of each, distinct if it can.

    Batches are drawn independently, so an epoch does not show every image once (L-MCL, Yang et al. 2023).
    """
    positions = labels.argsort(stable=True)
    sizes = labels.bincount()
    starts = sizes.cumsum(0) - sizes
    present = sizes.nonzero().flatten()
    rows = max(1, NUMBERS // len(present))
    batches = [rows] * (len(labels) // batch_size // rows) + [len(labels) // batch_size % rows]
    classes = torch.cat([_some(len(present), batch_size // count, many, generator) for many in batches])
    drawn = present[classes.flatten()]
    return positions[starts[drawn, None] + _distinct(sizes[drawn], count, generator)].flatten()


def _some(classes: int, count: int, batches: int, generator: torch.Generator) -> Tensor:
    """`count` different classes for each batch, in random order: (batches, count)."""
    return torch.rand(batches, classes, generator=generator).topk(count).indices


def _distinct(sizes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the numbers below each of `sizes` (G,), in random order: (G, count), different where there are enough.

    The i-th is drawn from the numbers that are left, and counted past those that are taken, the smallest first.
    """
    drawn = torch.rand(len(sizes), count, dtype=torch.float64, generator=generator)
    enough = sizes >= count
    chosen = torch.empty(len(sizes), count, dtype=torch.int64)
    for i in range(count):
        number = (drawn[:, i] * (sizes - i * enough)).long()
        for taken in chosen[:, :i].sort(1).values.unbind(1):
            number += (number >= taken) & enough
        chosen[:, i] = number
    return chosen
