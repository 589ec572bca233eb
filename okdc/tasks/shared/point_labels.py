"""The labels of key points: x and y in input pixels, a weight, and perhaps where the image came from. K key points.

Columns after the third are alike for all points of an image: pixels of the source per pixel of the input, the length
that PCK counts in and the area of OKS in pixels of the source, and the number of the picture, below 0 for one that has
one instance alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from okdc.errors import DataError

COLUMNS, ORIGIN = 3, 4
AREA = 0.53  # of a box, where nobody drew an outline: the share that COCO's people have


def checked_points(labels: Tensor, count: int, role: str, outputs: int) -> Tensor:
    """Points (B, K, 3 or 7) float32; DataError, with the way out, for all else. `outputs`: K, or 0."""
    expected = (
        f"expected for each image and key point x and y in pixels of the input and a weight (1 labelled, 0 not), shape "
        f"({count}, {outputs or 'key points'}, {COLUMNS})"
    )
    given = f"the {role} loader gave labels of shape {tuple(labels.shape)} and type {labels.dtype} for {count} images"
    if not count or labels.ndim != 3 or len(labels) != count or labels.shape[2] not in (COLUMNS, COLUMNS + ORIGIN):
        weights = " Without weights: torch.cat([xy, torch.ones_like(xy[..., :1])], 2)." * (labels.shape[-1:] == (2,))
        raise DataError(f"{given}; {expected}.{weights}")
    if outputs and labels.shape[1] != outputs:
        raise DataError(f"{given}; {expected}: a row for each of {outputs} key points. num_classes=N says another K.")
    points = labels.float()
    if (points[..., 2] < 0).any() or not points.isfinite().all():
        raise DataError(
            f"the {role} labels hold weights below 0, NaN or infinite numbers; {expected}. A point that is not seen "
            "has the weight 0, and any finite place."
        )
    return points


def with_origin(labels: Tensor, input_size: Sequence[int]) -> Tensor:
    """Labels (B, K, 7): what says nothing of its origin is its own source, and its length the input's longer side."""
    if labels.shape[2] > COLUMNS:
        return labels
    height, width = input_size[-2:]
    origin = labels.new_tensor([1.0, max(height, width), AREA * height * width, -1.0])
    return torch.cat([labels, origin.expand(*labels.shape[:2], ORIGIN)], 2)
