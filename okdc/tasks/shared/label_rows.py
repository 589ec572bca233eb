"""Rows of labels: for each image and label 1 where it is there and 0 where not. N images, B batch, C labels."""

from __future__ import annotations

import torch
from torch import Tensor

from okdc.errors import DataError


def rarest(rows: Tensor) -> Tensor:
    """Of the labels that each row (N, C) has, the one that fewest rows have, (N,) int64; C where it has none.

    >>> rarest(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
    tensor([1, 0, 2])
    """
    ranked = rows.sum(0).argsort(stable=True)
    first = rows[:, ranked].argmax(1)
    return torch.where(rows.any(1), ranked[first], rows.shape[1])


def checked_rows(labels: Tensor, count: int, role: str, outputs: int) -> Tensor:
    """Rows (B, C) float32 of 0 and 1; DataError, with the way out, for all else. `outputs`: C, or 0."""
    expected = f"expected for each image and label 1 or 0, shape ({count}, {outputs or 'labels'})"
    given = f"the {role} loader gave labels of shape {tuple(labels.shape)} and type {labels.dtype} for {count} images"
    if labels.ndim == 1 and len(labels) == count and not labels.is_floating_point():
        raise DataError(
            f"{given}; {expected}. Where an image has one class: --task classify (task='classify'); as rows: "
            "torch.nn.functional.one_hot(labels, N).float()"
        )
    if not count or labels.ndim != 2 or len(labels) != count:
        raise DataError(f"{given}; {expected}.")
    if outputs and labels.shape[1] != outputs:
        raise DataError(
            f"{given}; {expected}: a column for each of {outputs} labels. Say num_classes=N if that is wrong."
        )
    rows = labels.float()
    if wrong := int(((rows != 0) & (rows != 1)).sum()):
        odd = rows[(rows != 0) & (rows != 1)][0]
        raise DataError(
            f"{wrong} of the {role} labels are neither 0 nor 1, such as {odd:g}; {expected}. Of mixed images or of "
            "shares there is no average precision: leave out mixup, or (labels > 0.5).float()"
        )
    return rows
