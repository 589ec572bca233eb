"""Several labels for an image, or none: one logit for each label, which is there or not whatever the others are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from okdc.losses import binary_cross_entropy, binary_kl, soft_binary_cross_entropy
from okdc.tasks.shared.label_rows import checked_rows, rarest
from okdc.tasks.shared.label_scores import LabelScorer, LabelTally, thresholds
from okdc.tasks.task import Metric, Task

_MIXED = "it makes images that have shares of labels, of which there is no average precision"


class Multilabel(Task):
    """Logits (B, C), labels (B, C) float of 0 and 1; probabilities are sigmoids, each with a threshold of its own."""

    name = "multilabel"
    output = "one tensor of logits (batch, labels)"
    metrics = {"map": Metric("mAP", about="the mean of all labels' average precision")}
    scores = ("map",)
    unsupported = {
        "mixup": _MIXED, "cutmix": _MIXED, "smoothing": "it shares one label among all classes",
        "balanced_sampling": "an image has no one class to draw it by: --pos-weight auto weighs rare labels",
        "distance": "it compares the classes of an image with one another, and labels do not depend on each other",
        "distance_kwargs": "it has one distance, without weights",
        "class_weights": "it weighs the one class of an image: --pos-weight",
    }  # fmt: skip
    loss = "binary_cross_entropy"
    weighing = "pos_weight"
    activation = "Sigmoid"
    several = True
    settles = True
    same = "the same labels, all of them"
    use = "Label an image"

    def __init__(self, noted: Mapping[str, Any]) -> None:
        super().__init__(noted)
        self.thresholds: list[float] | None = noted.get("thresholds")

    def are_probabilities(self, out: Tensor) -> bool:
        return bool(((out >= 0) & (out <= 1)).all())

    def checked_labels(self, labels: Tensor, count: int, role: str, outputs: int) -> Tensor:
        return checked_rows(labels, count, role, outputs)

    def outputs(self, labels: Tensor) -> int:
        return labels.shape[1]

    def kinds(self, labels: Tensor) -> Tensor:
        return rarest(labels)

    def per_output(self, labels: Tensor, outputs: int) -> Tensor:
        return labels.sum(0).long()

    def made_up(self, numbers: Tensor, outputs: int) -> Tensor:
        return one_hot(numbers % outputs, outputs).float()

    def weights(self, labels: Tensor, outputs: int) -> Tensor:
        """As many times as images without a label outnumber those with it, (C,); 1 for a label that none has."""
        there = labels.sum(0)
        return ((len(labels) - there) / there).where(there > 0, 1.0)

    def supervised(self, out: Tensor, labels: Tensor) -> Tensor:
        return binary_cross_entropy(out, labels)

    def distance(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        *,
        eps: float = 0.0,
        detach: bool = True,
    ) -> Tensor:
        return binary_kl(student, teacher, temperature, eps=eps, detach=detach)

    def soft(
        self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, *, detach: bool = True
    ) -> Tensor:
        return soft_binary_cross_entropy(student, teacher, temperature, detach=detach)

    def scorer(self, outputs: int, others: int = 0) -> LabelScorer:
        return LabelScorer(outputs, others)

    def guessing(self, counts: Tensor) -> float:
        return float((counts[:, 0] / counts[:, 2]).mean())

    def tally(self) -> LabelTally:
        odds = np.array(self.thresholds or 0.5, dtype=np.float64)
        with np.errstate(divide="ignore"):
            return LabelTally(limits=np.log(odds) - np.log1p(-odds))

    def detail(self, counts: Tensor | None, names: Sequence[str]) -> dict[str, Any]:
        if counts is None:
            return {"labels": None}
        limits: Sequence[float | None] = self.thresholds or [None] * len(names)
        rows = zip(names, counts.tolist(), limits, strict=True)
        return {
            "labels": [
                {"name": name, "images": int(images), "ap": ap if images else None, "threshold": threshold}
                for name, (images, ap, _), threshold in rows
            ]
        }

    def notable(self, out: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of those that are right, the smaller the loss the more it tells; of the others, the larger."""
        right = ((out.float().sigmoid() > self._limits(out)) == (labels > 0.5)).all(1)
        loss = binary_cross_entropy_with_logits(out.float(), labels.float(), reduction="none").mean(1)
        return right, torch.where(right, -loss, loss)

    def said(self, out: Tensor, names: Sequence[str]) -> list[tuple[str, float]]:
        odds = out.float().sigmoid()
        there = odds > self._limits(out)
        return [(names[i], 100 * float(odds[i])) for i in odds.argsort(descending=True).tolist() if there[i]]

    def truth(self, label: Tensor, names: Sequence[str]) -> list[str]:
        return [name for name, there in zip(names, label.tolist(), strict=True) if there > 0.5]

    def _limits(self, out: Tensor) -> Tensor:
        """The probability from which on each label is said to be there, (C,) or ()."""
        return out.new_tensor(self.thresholds or 0.5, dtype=torch.float32)

    def settle(self, outs: Tensor, labels: Tensor) -> None:
        self.thresholds = thresholds(outs.double().sigmoid().numpy(), labels.numpy())

    def facts(self) -> dict[str, Any]:
        return {"task": self.name} | ({"thresholds": self.thresholds} if self.thresholds else {})


TASK = Multilabel
