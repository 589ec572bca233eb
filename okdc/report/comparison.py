"""The page of a comparison: who is better than plain training, by how much, for how much compute; from plain values."""

from __future__ import annotations

import csv
import io
import math
from functools import partial
from pathlib import Path
from typing import Any

from okdc.report.plots import line_chart, placer, ticks_for
from okdc.report.rendering import HUES, plain, write_all
from okdc.report.words import number
from okdc.system import files

NAME = "compare"
COLUMNS = ("name", "epochs", "lr", "compute", "seconds", "mean", "deviation", "seeds", "problem")
INTERVAL = ("mean", "low", "high")


def write_comparison(folder: Path, facts: dict[str, Any]) -> Path:
    """Write compare.json (the facts), compare.csv, compare.md and compare.html into `folder`; returns the html."""
    folder, facts = Path(folder), plain(facts)
    page = write_all(folder, NAME, facts, view(facts))
    files.atomically(folder / f"{NAME}.csv", partial(Path.write_text, data=_csv(facts["lines"]), encoding="utf-8"))
    return page


def _csv(lines: list[dict[str, Any]]) -> str:
    """One row for each arm, then its figure of each seed."""
    seeds = sorted({int(seed) for line in lines for seed in line["scores"]})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    gains = [f"{kind}_{part}" for kind in ("gain", "equal") for part in INTERVAL]
    writer.writerow([*COLUMNS, *gains, *(f"seed_{seed}" for seed in seeds)])
    for line in lines:
        flat = line | (line["spread"] or {})
        parts = [(line[kind] or {}).get(part) for kind in ("gain", "equal") for part in INTERVAL]
        scores = [line["scores"].get(str(seed)) for seed in seeds]
        writer.writerow([*(flat.get(column) for column in COLUMNS), *parts, *scores])
    return text.getvalue()


def view(facts: dict[str, Any]) -> dict[str, Any]:
    """What the templates show of the facts."""
    lines = [line | {"hue": _hue(at, line["name"])} for at, line in enumerate(facts["lines"])]
    done = [line for line in lines if line["spread"]]
    return facts | {
        "lines": lines,
        "hues": HUES,
        "error": _standard_error(done, facts["images"]),
        "equal": any(line["equal"] for line in lines),
        "dots": _dots(done),
        "costs": _costs(done),
        "curves": _curves(done),
        "failed": [line for line in lines if line["problem"]],
        "seeds": max((line["spread"]["seeds"] for line in done), default=0),
    }


def _hue(at: int, name: str) -> str:
    return "baseline" if name == "baseline" else f"hue{at % HUES}"


def _standard_error(lines: list[dict[str, Any]], images: int | None) -> float | None:
    """Of one figure by the number of images alone, points: that of a share, at the best line's mean."""
    if not lines or not images:
        return None
    share = lines[0]["spread"]["mean"] / 100
    return 100 * math.sqrt(max(share * (1 - share), 0) / images)


def _dots(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A dot for each seed and a bar at the mean, all on one axis."""
    values = [value for line in lines for value in line["scores"].values()]
    if not values:
        return None
    ticks = ticks_for(min(values), max(values), 5)
    place = placer(ticks[0], ticks[-1])
    rows = [
        line | {"at": [place(value) for value in line["scores"].values()], "middle": place(line["spread"]["mean"])}
        for line in lines
    ]
    return {"rows": rows, "ticks": [{"at": place(tick), "text": f"{tick:g}"} for tick in ticks]}


def _costs(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean of each line over the compute that its training takes."""
    if len(lines) < 2:
        return None
    xs, ys = [line["compute"] for line in lines], [line["spread"]["mean"] for line in lines]
    across, up = ticks_for(0, max(xs)), ticks_for(min(ys), max(ys))
    right, above = placer(across[0], across[-1]), placer(up[0], up[-1])
    return {
        "points": [line | {"x": right(x), "y": 100 - above(y)} for line, x, y in zip(lines, xs, ys, strict=True)],
        "xticks": [{"at": right(tick), "text": f"{tick:g}"} for tick in across],
        "yticks": [{"at": round(100 - above(tick), 2), "text": f"{tick:g}"} for tick in up],
    }


def _curves(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The figure by epoch, the mean of the seeds; the steep start lies below the axis."""
    drawn = [
        (line["name"], line["hue"], [(at + 1.0, y) for at, y in enumerate(map(number, line["curve"])) if y is not None])
        for line in lines
    ]
    late = [value for _, _, points in drawn for _, value in points[len(points) // 3 :]]
    return line_chart(drawn, 340, floor=min(late)) if late else None
