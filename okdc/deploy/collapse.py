"""Whether a bundle that is verified on other images than its export's still knows what it knew."""

from __future__ import annotations

import math
from collections.abc import Sequence

from okdc.verification.schema import Row, Verification


def say_collapse(rows: Sequence[Row], read: int, images: int, recorded: Verification, classes: int) -> None:
    """Say in the first float32 row with a top-1 where that is lower than the recorded one by more than chance allows.

    That is three standard deviations of the difference of two samples of one share: the `read` of the `images` here,
    and those of the export. What was not read to its end may have come class by class: as many draws as `classes`.
    """
    row, before = _scored(rows), _scored(recorded["rows"])
    if row is None or before is None or row["top1"] is None or before["top1"] is None:
        return
    lost = before["top1"] - row["top1"]
    samples = ((read, images), (recorded["images"], recorded["data"].get("images", 0)))
    here, then = [count if count >= whole else min(count, classes) for count, whole in samples]
    share = (row["top1"] * here + before["top1"] * then) / (here + then) / 100
    allowed = 300 * math.sqrt(share * (1 - share) * (1 / here + 1 / then))
    if lost > allowed + 1e-9:
        told = (
            f"its top-1 is {row['top1']:.2f}% on these {read:,} images and was {before['top1']:.2f}% on the "
            f"{recorded['images']:,} of the export, {lost:.3g} points lower where chance explains {allowed:.3g}: these "
            "are harder, labelled otherwise or prepared in another way, and how good the student is here was not shown"
        )
        row["reason"] = f"{row['reason']}; {told}" if row["reason"] else told


def _scored(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.get("precision") == "fp32" and row["top1"] is not None), None)
