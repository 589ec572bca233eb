"""How well the images with a label are ranked before those without: per epoch, and of an exported file.

N images, B batch, C labels. Average precision is scikit-learn's, the mean precision at each image that has the label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from okdc.ranks import rank, world
from okdc.tasks.shared.scorer import Scorer
from okdc.tasks.shared.tally import Tally


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Per cent, of each label (C,), by scores and labels (N, C); NaN for one that no image has."""
    from sklearn.metrics import average_precision_score

    return np.array([
        100 * average_precision_score(truth, score) if truth.any() else np.nan
        for truth, score in zip(labels.T, scores.T, strict=True)
    ])  # fmt: skip


def mean(precisions: np.ndarray) -> float:
    """Their mean over the labels that some image has; 0 where there is none."""
    known = precisions[~np.isnan(precisions)]
    return float(known.mean()) if len(known) else 0.0


def thresholds(odds: np.ndarray, labels: np.ndarray) -> list[float]:
    """Probabilities above which each label (C,) is said to be there: those of the best F1, by odds and labels (N, C).

    Half-way between the image that is just named and the next; 0.5 for a label that all images have, or none.
    """
    return [_threshold(column, truth) for column, truth in zip(odds.T, labels.T, strict=True)]


def _threshold(odds: np.ndarray, truth: np.ndarray) -> float:
    if truth.all() or not truth.any():
        return 0.5
    order = np.argsort(-odds, kind="stable")
    ranked, named = odds[order], np.arange(1, len(odds) + 1)
    f1 = 2 * truth[order].cumsum() / (named + truth.sum())
    ends = np.append(ranked[1:] < ranked[:-1], True)  # images of one score are named together
    best = int(np.where(ends, f1, -1.0).argmax())
    following = ranked[best + 1] if best + 1 < len(ranked) else 0.0
    return float((ranked[best] + following) / 2)


class LabelScorer(Scorer):
    """Mean average precision (per cent) and binary cross entropy; what all images were given is kept.

    Its counts (C, 3) are of each label how many images have it, its average precision, and how many images there are.
    """

    def __init__(self, labels: int, others: int) -> None:
        self.labels, self.loss = labels, 0.0
        self.rows = torch.zeros(0, (2 + others) * labels, dtype=torch.float64)  # truth, student, others, side by side
        self.parts: list[Tensor] = []

    def update(self, student: Tensor, labels: Tensor, others: Sequence[Tensor] = ()) -> None:
        loss = F.binary_cross_entropy_with_logits(student.float(), labels, reduction="sum") / self.labels
        told = torch.cat([out.float() for out in (labels, student, *others)], 1)
        got = torch.cat([told.flatten(), loss[None]]).cpu()
        self.parts.append(got[:-1].view_as(told))
        self.loss += got[-1].item()
        self.images += len(labels)

    def add_up(self, add: Callable[[Tensor], Tensor]) -> None:
        """Each process puts its rows where those of the processes before it end; the sum is then all of them."""
        own = torch.zeros(world() + 1, dtype=torch.float64)
        own[rank()], own[-1] = self.images, self.loss
        *counts, loss = add(own).tolist()
        each = [round(count) for count in counts]
        start, rows = sum(each[: rank()]), torch.zeros(sum(each), self.rows.shape[1], dtype=torch.float64)
        rows[start : start + self.images] = self._all()
        self.parts = [add(rows.flatten()).view_as(rows).float()] if len(rows) else []
        self.loss, self.images = loss, len(rows)

    def value(self) -> dict[str, float]:
        return {"loss": self.loss / self.images, "map": mean(self.counts()[:, 1].numpy())}

    def others(self) -> list[float]:
        truth, _, *others = self._all().split(self.labels, 1)
        return [mean(average_precisions(out.numpy(), truth.numpy())) for out in others]

    def counts(self) -> Tensor:
        truth, student, *_ = self._all().split(self.labels, 1)
        precisions = torch.from_numpy(average_precisions(student.numpy(), truth.numpy()))
        images = torch.full_like(precisions, len(truth))
        return torch.stack([truth.sum(0).double(), precisions, images], 1)

    def _all(self) -> Tensor:
        return torch.cat(self.parts) if self.parts else self.rows.float()


@dataclass
class LabelTally(Tally):
    """The mean average precision, and whether the labels above their `limits` (C,), logits, are the reference's."""

    limits: np.ndarray | float = 0.0
    outs: list[np.ndarray] = field(default_factory=list)
    truth: list[np.ndarray] = field(default_factory=list)

    def same(self, out: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return ((out > self.limits) == (reference > self.limits)).all(axis=1)

    def tied(self, out: np.ndarray, reference: np.ndarray, least: float) -> np.ndarray:
        alike = (out > self.limits) == (reference > self.limits)
        return (alike | (np.abs(reference - self.limits) < least)).all(axis=1)

    def count(self, out: np.ndarray, labels: np.ndarray) -> None:
        self.outs.append(out.astype(np.float32))
        self.truth.append(labels)

    def scores(self) -> dict[str, float]:
        return {"map": mean(average_precisions(np.concatenate(self.outs), np.concatenate(self.truth)))}
