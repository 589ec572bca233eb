"""A class-balanced order: every class that occurs in a batch occurs there as often as the others, twice at least."""

from __future__ import annotations

import torch
from torch import Tensor

from okdc.errors import DataError


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
    ends = labels.bincount().cumsum(0).tolist()
    members = [positions[start:end] for start, end in zip([0, *ends], ends) if end > start]
    order = []
    for _ in range(len(labels) // batch_size):
        for cls in torch.randperm(len(members), generator=generator)[: batch_size // count].tolist():
            images = members[cls]
            if len(images) < count:
                chosen = torch.randint(len(images), (count,), generator=generator)
            else:
                chosen = torch.randperm(len(images), generator=generator)[:count]
            order.append(images[chosen])
    return torch.cat(order)
