"""Which images can be read: what is missing is named and counted, and too much of it stops a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from okdc.data.images import Images
from okdc.data.names import listed
from okdc.data.transforms import read
from okdc.data.values import BadImage, log
from okdc.errors import DataError, counted
from okdc.system.waiting import limited


class BadImages:
    """Unreadable images of one split: each is named once in the log and counted in `counts`, class by class.

    A DataError stops the run at more than `limit` in all splits, which share their `reasons`, at most of the images of
    a class, and at half of those of the split.
    """

    def __init__(self, limit: int, split: str, classes: Sequence[str], labels: Tensor, reasons: dict[str, str]):
        self.limit, self.split, self.classes, self.reasons = limit, split, classes, reasons
        self.counts = {cls: {"images": 0, "unreadable": 0} for cls in classes}
        for label in labels.tolist():
            self.counts[classes[label]]["images"] += 1

    def add(self, name: str, reason: str, label: int) -> None:
        """Count an image that cannot be read; once, however often it is met."""
        if name in self.reasons:
            return
        self.reasons[name] = reason
        log.warning("skipped an unreadable image: %s (%s)", name, reason)
        if len(self.reasons) > self.limit:
            some = "; ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:5])
            raise DataError(
                f"{counted(len(self.reasons), 'image')} cannot be read, and at most {self.limit} may be skipped. "
                f"Some of them: {some}. Mend or delete them, or allow more with --max-bad-images N."
            )
        cls = self.classes[label]
        self.counts[cls]["unreadable"] += 1
        self._stop(f"{self.split} images of class {cls}", self.counts[cls], name, reason, most=True)
        whole = {key: sum(of_class[key] for of_class in self.counts.values()) for key in ("images", "unreadable")}
        self._stop(f"{self.split} images", whole, name, reason, most=False)

    def _stop(self, what: str, counts: dict[str, int], name: str, reason: str, most: bool) -> None:
        if 2 * counts["unreadable"] >= counts["images"] + most:
            raise DataError(
                f"{counts['unreadable']} of the {counts['images']} {what} cannot be read, the last of them {name} "
                f"({reason}). The others are not the data set any more: mend the files, or delete them."
            )


def check_readable(images: Images, bad: BadImages, config: dict[str, Any], timeout: float) -> None:
    """Read one image of each class; DataError for classes that have none to read, or none that comes in `timeout`."""

    def near(count: int) -> str:
        return f"while reading an image of each class of {images.origin}, after {count} classes"

    lost = [found for found in limited(_first_unreadable(images, config), timeout, near) if found]
    if not lost:
        return
    name, reason, _ = lost[0]
    of_all = len(lost) == len(images.kinds.unique())
    which = "images" if of_all else f"images of class {listed(bad.classes[label] for *_, label in lost)}"
    raise DataError(
        f"none of the {bad.split} {which} can be read, for example {name} ({reason}). Mend the files, or check --data."
    )


def _first_unreadable(images: Images, config: dict[str, Any]) -> Iterator[BadImage | None]:
    """For each class the first of its images if none of them can be read, else None."""
    kinds = images.kinds
    order = kinds.argsort(stable=True)
    for positions in order.split(kinds.unique(return_counts=True)[1].tolist()):
        bad: list[BadImage] = []
        found = any(read(images, position, config, bad) is not None for position in positions.tolist())
        yield None if found else bad[0]
