"""Whether a bundle that is verified on other images than its export's still knows what it knew."""

from __future__ import annotations

import math
from collections.abc import Sequence

from okdc.tasks.task import Task
from okdc.verification.schema import Row, Verification, score


def say_collapse(rows: Sequence[Row], here: int, recorded: Verification, classes: int, task: Task) -> None:
    """Say in the first float32 row where its metric is lower than the recorded one by more than chance allows.

    That is three standard deviations of the difference of two samples of one share: the images `here`, and those of the
    export. Of an export that took the first images, class by class, as many are counted as there are `classes`.
    """
    row, now = _scored(rows, task.metric)
    _, before = _scored(recorded["rows"], task.metric)
    if row is None or now is None or before is None:
        return
    lost = before - now
    then = recorded["images"] if is_fair(recorded) else min(recorded["images"], classes)
    share = (now * here + before * then) / (here + then) / 100
    allowed = 300 * math.sqrt(share * (1 - share) * (1 / here + 1 / then))
    if lost > allowed + 1e-9:
        told = (
            f"its {task.word} is {now:.2f}% on these {here:,} images and was {before:.2f}% on the "
            f"{recorded['images']:,} of the export, {lost:.3g} points lower where chance explains {allowed:.3g}: these "
            "are harder, labelled otherwise or prepared in another way, and how good the student is here was not shown"
        )
        row["reason"] = f"{row['reason']}; {told}" if row["reason"] else told


def is_fair(recorded: Verification) -> bool:
    """Whether a bundle was verified on all images or on a sample: okdc once took the first ones."""
    return bool(recorded.get("sample")) or recorded["images"] >= recorded["data"].get("images", 0)


def _scored(rows: Sequence[Row], metric: str) -> tuple[Row | None, float | None]:
    """The first float32 row that has the metric, and that."""
    measured = ((row, score(row, metric)) for row in rows if row.get("precision") == "fp32")
    return next(((row, figure) for row, figure in measured if figure is not None), (None, None))
