"""What is counted when a runner's outputs are held against labels and against a reference; each task has its own.

B batch, C outputs of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Tally:
    """Counts and sums (float64) of one runner over the images."""

    images: int = 0
    compared: int = 0
    agree: int = 0
    ties: int = 0
    logits: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    scale: float = 0.0
    finite: bool = True
    batches: dict[int, tuple[float, float, int]] = field(default_factory=dict)  # size: largest and summed difference, n

    def same(self, out: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """On which images (B,), or outputs of them (B, C), outputs (B, C, ...) say the same as the reference's."""
        raise NotImplementedError

    def tied(self, out: np.ndarray, reference: np.ndarray, least: float) -> np.ndarray:
        """On which of those that are not the same a difference of less than `least` may have turned it over."""
        raise NotImplementedError

    def count(self, out: np.ndarray, labels: np.ndarray) -> None:
        """Count a batch of outputs (B, C, ...) against its labels."""
        raise NotImplementedError

    def scores(self) -> dict[str, float]:
        """The task's `scores`, per cent of what was counted."""
        raise NotImplementedError

    def score(self, out: np.ndarray, labels: np.ndarray | None) -> None:
        """Count a batch against its labels, where there are some."""
        self.images += len(out)
        self.finite = self.finite and bool(np.isfinite(out).all())
        if labels is not None:
            self.count(out, labels)

    def agreement(self, out: np.ndarray, reference: np.ndarray, tolerance: float) -> None:
        """Count on how many images, or outputs of them, both say the same, and the ties.

        A tie is what differences *within the tolerance* may turn over. Measured against the differences that occurred,
        every disagreement would be a tie: turning a choice over takes a difference of at least half the margin.
        """
        same = self.same(out, reference)
        tie = self.tied(out, reference, tolerance * np.abs(reference).max())
        self.compared += same.size
        self.agree += int(same.sum())
        self.ties += int((tie & ~same).sum())

    def difference(self, out: np.ndarray, reference: np.ndarray) -> None:
        """Add the differences of two arrays (B, C, ...)."""
        with np.errstate(invalid="ignore"):  # what is not finite is told by `finite`
            difference = np.abs(np.asarray(out, dtype=np.float64) - reference)
        self.finite = self.finite and bool(np.isfinite(out).all())
        self.max_abs = max(self.max_abs, float(difference.max()))
        self.sum_abs += float(difference.sum())
        self.logits += difference.size
        self.scale = max(self.scale, float(np.abs(reference).max()))
        largest, summed, count = self.batches.get(len(out), (0.0, 0.0, 0))
        largest = max(largest, float(difference.max()))
        self.batches[len(out)] = largest, summed + float(difference.sum()), count + difference.size

    def row(self, labelled: bool, names: tuple[str, ...]) -> dict[str, Any]:
        """The measured columns of a verification row, of scores those of these names; what was not measured is None."""
        differs = self.logits > 0 and self.finite
        labelled = labelled and self.images > 0 and self.finite
        return {
            **(self.scores() if labelled else dict.fromkeys(names)),
            "agreement": 100 * (self.agree + self.ties) / self.compared if self.compared and self.finite else None,
            "ties": self.ties,
            "max_abs": self.max_abs if differs else None,
            "mean_abs": self.sum_abs / self.logits if differs else None,
            "rel": self.max_abs / max(self.scale, np.finfo(np.float64).tiny) if differs else None,
            "differences": [
                {"batch": size, "max_abs": largest, "mean_abs": summed / count}
                for size, (largest, summed, count) in sorted(self.batches.items())
                if differs
            ],
        }
