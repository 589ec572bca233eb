"""How often the class that is named is the true one: per epoch, and of an exported file. B batch, C classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from okdc.tasks.shared import confusion
from okdc.tasks.shared.scorer import Scorer
from okdc.tasks.shared.tally import Tally


class ClassScorer(Scorer):
    """Top-1, top-5, balanced accuracy (per cent) and cross entropy; its counts are those of `confusion`."""

    def __init__(self, classes: int, others: int) -> None:
        self.classes = classes
        self.sums = torch.zeros(others + 3, dtype=torch.float64)  # right: the others, student; its top 5, loss
        self.cells: list[Tensor] = []
        self.table: Tensor | None = None

    def update(self, student: Tensor, labels: Tensor, others: Sequence[Tensor] = ()) -> None:
        counts = [(logits.argmax(1) == labels).sum() for logits in (*others, student)]
        top5 = student.topk(min(5, student.shape[1])).indices.eq(labels[:, None]).sum()
        loss = F.cross_entropy(student.float(), labels, reduction="sum")
        told = torch.stack([*counts, top5, loss]), confusion.cells(student.argmax(1), labels, self.classes)
        got = torch.cat([part.double() for part in told]).cpu()  # the one transfer
        self.sums += got[: len(self.sums)]
        self.cells.append(got[len(self.sums) :].long())
        self.images += len(labels)

    def add_up(self, add: Callable[[Tensor], Tensor]) -> None:
        table = self.counts()
        added = add(torch.cat([self.sums, table.flatten().double(), self.sums.new_tensor([self.images])]))
        self.table = added[len(self.sums) : -1].round().int().view_as(table)
        self.sums, self.images = added[: len(self.sums)], round(added[-1].item())

    def value(self) -> dict[str, float]:
        *_, top1, top5, loss = (self.sums / self.images).tolist()
        return {
            "loss": loss, "top1": 100 * top1, "top5": 100 * top5, "balanced": confusion.balanced(self.counts()),
        }  # fmt: skip

    def others(self) -> list[float]:
        return [100 * share for share in (self.sums / self.images).tolist()[:-3]]

    def counts(self) -> Tensor:
        """The counts (C, columns) of images by cell, from the cells of all batches."""
        if self.table is None:
            columns = confusion.columns(self.classes)
            every = torch.cat(self.cells) if self.cells else torch.zeros(0, dtype=torch.int64)
            self.table = torch.bincount(every, minlength=self.classes * columns).view(self.classes, columns).int()
        return self.table


@dataclass
class ClassTally(Tally):
    """How often the true class is the first, and among the first five, and the same class as the reference's."""

    top1: int = 0
    top5: int = 0

    def same(self, out: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return out.argmax(axis=1) == reference.argmax(axis=1)

    def tied(self, out: np.ndarray, reference: np.ndarray, least: float) -> np.ndarray:
        top2 = np.partition(reference, -min(2, reference.shape[1]), axis=1)[:, -2:]
        return top2[:, -1] - top2[:, 0] < 2 * least

    def count(self, out: np.ndarray, labels: np.ndarray) -> None:
        known = (labels >= 0) & (labels < out.shape[1])
        own = out[np.arange(len(out)), np.where(known, labels, 0)][:, None]
        first = np.arange(out.shape[1]) < labels[:, None]  # of equal ones the first comes first
        before = (out > own).sum(axis=1) + ((out == own) & first).sum(axis=1)
        found = known & ~np.isnan(own[:, 0])
        self.top1 += int((found & (before < 1)).sum())
        self.top5 += int((found & (before < 5)).sum())

    def scores(self) -> dict[str, float]:
        return {"top1": 100 * self.top1 / self.images, "top5": 100 * self.top5 / self.images}
