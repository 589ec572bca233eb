"""Maps and tokens: where the channels are, and how many pixels or tokens an output has."""

from __future__ import annotations

import math


def positions(shape: tuple[int, ...] | None, aspect: float) -> int | None:
    """Pixels or tokens of one output shape without its batch; None when it is neither map nor tokens."""
    if shape is None or len(shape) not in (2, 3):
        return None
    if len(shape) == 2:
        return shape[0]
    return math.prod(shape[:2] if layout(shape, aspect) == "nhwc" else shape[1:])


def same_size(one: int | None, other: int | None) -> bool:
    """Whether two counts of positions are of one stage: equal but for class tokens or pixels lost at the border."""
    return bool(one and other) and 2 * max(one, other) < 3 * min(one, other)  # type: ignore[operator,type-var]


def layout(shape: tuple[int, ...], aspect: float) -> str:
    """Where the channels are, judged by which two sides have the image's aspect ratio."""
    if len(shape) == 2:
        return "tokens"
    c, h, w = shape
    return "nhwc" if abs(h / w - aspect) > 0.2 and abs(c / h - aspect) <= 0.2 else "nchw"
