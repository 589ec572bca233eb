"""results.png: how the student's metric and loss went, beside the baseline's, in one picture to send or to paste."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from okdc import tasks
from okdc.report.plots import Named, Points, line_chart
from okdc.report.words import digits, epoch, number
from okdc.system import files

if TYPE_CHECKING:
    from PIL import ImageDraw

SIZE = 1200, 900  # pixels
_INKS = {"student": "#3b4fd8", "baseline": "#5b6270", "line": "#e4e6eb", "text": "#16181d", "paper": "#ffffff"}
_LEFT, _RIGHT, _HIGH, _TOPS = 90, 940, 300, (80, 510)  # where the two plots are
_FINER = 3  # lines are drawn so many times larger, and made smaller


def series(run: dict[str, Any], key: str) -> Points:
    """A column of a run's history, by epoch from 1, where it is a number."""
    pairs = ((epoch(row.get("epoch")), number(row.get(key))) for row in run.get("history") or [])
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def write(path: Path, facts: dict[str, Any]) -> None:
    """Write the picture of a run's facts; nothing where it has no epoch."""
    from PIL import Image, ImageDraw

    task, control = tasks.get(facts.get("task") or tasks.DEFAULT), facts.get("baseline") or {}
    kinds = {f"eval_{task.metric}": f"{task.word} on the validation images, %", "eval_loss": "loss on the same images"}
    charts = []
    for key, title in kinds.items():
        lines: list[Named] = [
            ("student", "student", series(facts, key)),
            ("baseline", "baseline", series(control, key)),
        ]
        if chart := line_chart(lines, _HIGH):
            charts.append((title, chart))
    if not charts:
        return
    image = Image.new("RGB", (_FINER * SIZE[0], _FINER * SIZE[1]), _INKS["paper"])
    for top, (_, chart) in zip(_TOPS, charts):
        _lines(ImageDraw.Draw(image), chart, top)
    image = image.resize(SIZE, Image.Resampling.BOX)
    draw = ImageDraw.Draw(image)
    draw.text((_LEFT, 14), str(facts.get("title") or "results"), _INKS["text"], _font(20))
    for top, (title, chart) in zip(_TOPS, charts):
        _words(draw, title, chart, top)
    files.atomically(path, partial(image.save, format="PNG", optimize=True))


def _lines(draw: ImageDraw.ImageDraw, chart: dict[str, Any], top: int) -> None:
    """The grid and the curves of a chart, whose places are in per cent; the control's is the thinner one."""
    for tick in chart["yticks"]:
        draw.line([_at(0, tick["at"], top), _at(100, tick["at"], top)], _INKS["line"], _FINER)
    for line in reversed(chart["lines"]):
        ink, width = _INKS[line["hue"]], (4 if line["hue"] == "student" else 2) * _FINER
        places = [_at(x, y, top) for x, y in line["places"]]
        draw.line(places, ink, width, joint="curve")
        if chart["dots"]:
            for x, y in places:
                draw.ellipse((x - width, y - width, x + width, y + width), ink)


def _words(draw: ImageDraw.ImageDraw, title: str, chart: dict[str, Any], top: int) -> None:
    small, grey = _font(16), _INKS["baseline"]
    draw.text((_LEFT, top - 30), title + (", logarithmic" if chart["log"] else ""), _INKS["text"], _font(18))
    for tick in chart["yticks"]:
        draw.text((_LEFT - 12, top + tick["at"] * _HIGH / 100), tick["text"], grey, small, anchor="rm")
    for tick in chart["xticks"]:
        x = _LEFT + tick["at"] * (_RIGHT - _LEFT) / 100
        draw.text((x, top + _HIGH + 10), tick["text"], grey, small, anchor="ma")
    draw.text((_RIGHT + 24, top + _HIGH + 10), "epoch", grey, small, anchor="la")
    for line in chart["lines"]:
        words = f"{line['name']} {digits(line['value'])}"
        draw.text((_RIGHT + 16, top + line["at"] * _HIGH / 100), words, _INKS[line["hue"]], small, anchor="lm")


def _at(x: float, y: float, top: int) -> tuple[float, float]:
    """A place of a plot, in per cent, as a pixel of the finer picture."""
    return _FINER * (_LEFT + x * (_RIGHT - _LEFT) / 100), _FINER * (top + y * _HIGH / 100)


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
