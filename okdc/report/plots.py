"""Where things go in a plot, in per cent of its width and height, so that the report's page can give it any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Points = list[tuple[float, float]]  # (epoch, value)
Named = tuple[str, str, Points]  # name, hue (a class of the page), points
GAP = 16.0  # pixels from one label to the next


def line_chart(lines: Sequence[Named], height: int, floor: float | None = None) -> dict[str, Any] | None:
    """Paths, ticks and end labels of `lines`, or None where there is no point.

    `height` is in pixels. Values below `floor` leave the plot. Without a floor, positive values that span two decades
    or more are drawn on a logarithmic axis.
    """
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    xs = sorted({x for _, _, points in lines for x, _ in points})
    ys = [y for _, _, points in lines for _, y in points]
    positive = [y for y in ys if y > 0]
    log = floor is None and min(ys) >= 0 and bool(positive) and max(positive) >= 100 * min(positive)
    if log:
        lines = [(name, hue, [(x, y) for x, y in points if y > 0]) for name, hue, points in lines]
    yticks = _decades(positive) if log else ticks_for(min(ys) if floor is None else floor, max(ys))
    level: Callable[[float], float] = math.log10 if log else float
    across, up = placer(xs[0], xs[-1]), placer(level(yticks[0]), level(yticks[-1]))
    drawn = [_line(line, [(across(x), 100 - up(level(y))) for x, y in line[2]]) for line in lines if line[2]]
    for line, place in zip(drawn, apart([line["at"] for line in drawn], 100 * GAP / height)):
        line["at"] = place
    return {
        "lines": drawn,
        "height": height,
        "log": log,
        "cut": floor is not None and min(ys) < yticks[0],
        "dots": len(xs) <= 12,
        "across": across,
        "xticks": [{"at": across(x), "text": f"{x:g}"} for x in _epochs(xs)],
        "yticks": [{"at": round(100 - up(level(y)), 2), "text": f"{y:g}"} for y in yticks],
    }


def _line(line: Named, places: Points) -> dict[str, Any]:
    name, hue, points = line
    path = "M" + "L".join(f"{x:.2f},{y:.2f}" for x, y in places)
    return {"name": name, "hue": hue, "path": path, "places": places, "at": places[-1][1], "value": points[-1][1]}


def heat(table: Sequence[Sequence[int]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a square of counts: of each its name, and cells with their share of the row as an opacity from 0 to 1."""
    rows = []
    for at, (name, counts) in enumerate(zip(names, table, strict=True)):
        total = sum(counts) or 1
        cells = [{"count": n, "ink": round(n / total, 3), "right": i == at} for i, n in enumerate(counts)]
        rows.append({"name": name, "cells": cells})
    return rows


def placer(low: float, high: float) -> Callable[[float], float]:
    """A function from a value to per cent of the way from `low` to `high`; half way where there is no way."""
    return lambda value: round(100 * (value - low) / (high - low), 2) if high > low else 50.0


def ticks_for(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` or just below to `high` or just above; a per cent gets none beyond 100."""
    span = (high - low) or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / count))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * count >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = (first - 1, last) if first > 0 else (first, last + 1)
    return [round(at * step, 12) for at in range(first, last + 1)]


def _decades(positive: list[float]) -> list[float]:
    last = math.ceil(math.log10(max(positive)))
    first = max(math.floor(math.log10(min(positive))), last - 6)
    return [10.0**decade for decade in range(first, last + 1)]


def _epochs(xs: list[float], count: int = 6) -> list[float]:
    """The first and the last epoch, and round numbers between that keep their distance."""
    unit = 10 ** math.floor(math.log10(max((xs[-1] - xs[0]) / count, 1)))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * count >= xs[-1] - xs[0])
    between = range(step, math.floor(xs[-1]), step)
    return sorted({xs[0], xs[-1]} | {float(x) for x in between if xs[0] + step / 2 < x < xs[-1] - step / 2})


def spaced(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spaced, the first and the last among them."""
    parts = min(count, most) - 1
    return [round(at * (count - 1) / parts) for at in range(parts + 1)] if parts > 0 else list(range(count))


def apart(places: list[float], gap: float) -> list[float]:
    """`places` (per cent from the top) moved as little as needed to be `gap` apart and to end at the bottom."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved, least, most = list(places), 0.0, 100.0
    for at in order:
        moved[at] = max(moved[at], least)
        least = moved[at] + gap
    for at in reversed(order):
        moved[at] = round(min(moved[at], most), 2)
        most = moved[at] - gap
    return moved
