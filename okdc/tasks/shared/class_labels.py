"""The labels of the user's own loader: one class per image, or in training the share that each class has of it."""

from __future__ import annotations

import torch
from torch import Tensor

from okdc.errors import DataError

SLACK = 0.01  # in the sum of a row: shares of 16 bits are rounded


def checked_labels(labels: Tensor, count: int, role: str, num_classes: int) -> Tensor:
    """Class indices (B,) int64, or to train with shares (B, classes) float32, each row of which sums to 1.

    `num_classes` is 0 where it is not known. One-hot rows to validate with become class indices. Raises DataError, with
    the way out, for all else.
    """
    expected = f"expected one int64 class index per image, shape ({count},)"
    given = f"the {role} loader gave labels of shape {tuple(labels.shape)} and type {labels.dtype} for {count} images"
    if not count or not labels.ndim or len(labels) != count or labels.ndim > 2:
        raise DataError(f"{given}; {expected}.")
    if labels.ndim == 2:
        if labels.shape[1] == 1:
            raise DataError(f"{given}; {expected}: labels.squeeze(1){'' if labels.dtype == torch.int64 else '.long()'}")
        _check_rows(labels.float(), role)
        if not labels.is_floating_point():
            whole = ".long()" if labels.dtype == torch.bool else ""
            raise DataError(f"{given}; {expected}. They are one-hot: labels{whole}.argmax(1)")
        _check_columns(labels.shape[1], role, num_classes)
        if role == "training":
            return labels.float()
        if (labels.max(1).values < 1 - SLACK).any():
            raise DataError(f"{given}, with shares of several classes; {expected}: labels.argmax(1)")
        return labels.argmax(1)
    if labels.dtype != torch.int64:
        raise DataError(f"{given}; {expected}: labels.long()")
    _check_range(int(labels.min()), int(labels.max()), role, num_classes)
    return labels


def _check_rows(rows: Tensor, role: str) -> None:
    """Raise DataError for rows that do not share one image among the classes."""
    expected = "expected a share of each class, from 0 to 1, that sum to 1 for each image"
    if not rows.isfinite().all():
        raise DataError(
            f"the {role} labels hold NaN or infinite numbers; {expected}. Look where they are divided: by 0?"
        )
    if rows.min() < 0:
        raise DataError(f"the {role} labels go down to {rows.min():g}; {expected}. Of logits: labels.softmax(1)")
    sums = rows.sum(1)
    off = sums[(sums - 1).abs() > SLACK]
    if len(off):
        raise DataError(
            f"{len(off)} of {len(rows)} images have {role} labels that sum to something else than 1, such as "
            f"{off[0]:g}; {expected}. An image has one class here, not several or none (they may with task="
            "'multilabel'): leave out images without a class, and if several share an image: labels / labels.sum(1, "
            "keepdim=True)"
        )


def _check_columns(columns: int, role: str, num_classes: int) -> None:
    if num_classes and columns != num_classes:
        raise DataError(
            f"the {role} labels have {columns} columns; expected {num_classes}, one per class: num_classes=N"
        )


def _check_range(low: int, high: int, role: str, num_classes: int) -> None:
    if low < 0 or (num_classes and high >= num_classes):
        expected = f"0 to {num_classes - 1}" if num_classes else "0 and up"
        raise DataError(
            f"the {role} loader gave labels from {low} to {high}; expected {expected}. Say num_classes=N if there "
            "are more."
        )
