"""Classification: one logit for each class, one class for each image; in training perhaps its share of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from okdc.errors import RecipeError
from okdc.losses import correlation, cross_entropy, decoupled, kl, soft_cross_entropy, standardized
from okdc.tasks.shared import confusion
from okdc.tasks.shared.class_labels import checked_labels
from okdc.tasks.shared.class_scores import ClassScorer, ClassTally
from okdc.tasks.task import Metric, Task


class Classify(Task):
    """Logits (B, C), labels (B,) int64, or to train with probabilities (B, C)."""

    name = "classify"
    output = "one tensor of logits (batch, classes)"
    metrics = {
        "top1": Metric("top-1", "Acc@1"),
        "top5": Metric("top-5", "Acc@5"),
        "balanced": Metric("balanced accuracy", "balanced", "the mean of all classes' recalls"),
    }
    scores = ("top1", "top5")
    distances = {"kl": (), "standardized": (), "dkd": ("alpha", "beta"), "dist": ("beta", "gamma")}
    is_share = True
    unsupported = {"pos_weight": "it weighs labels that are there or not, and an image has one class: --class-weights"}
    same = "the same class"
    use = "Classify an image"

    def shown(self, outputs: int | None) -> dict[str, Metric]:
        """Of five classes or fewer the top five are all."""
        few = outputs is not None and outputs <= 5
        return {name: each for name, each in self.metrics.items() if not (few and name == "top5")}

    def are_probabilities(self, out: Tensor) -> bool:
        near = torch.allclose(out.sum(1), torch.ones_like(out[:, 0]), atol=1e-4)
        return out.shape[1] > 1 and bool((out >= 0).all()) and near

    def checked_labels(self, labels: Tensor, count: int, role: str, outputs: int) -> Tensor:
        return checked_labels(labels, count, role, outputs)

    def outputs(self, labels: Tensor) -> int:
        return labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1

    def kinds(self, labels: Tensor) -> Tensor:
        return labels if labels.ndim == 1 else labels.argmax(1)

    def per_output(self, labels: Tensor, outputs: int) -> Tensor:
        return labels.bincount(minlength=outputs)

    def made_up(self, numbers: Tensor, outputs: int) -> Tensor:
        return numbers % outputs

    def weights(self, labels: Tensor, outputs: int) -> Tensor:
        """In inverse proportion to the number of images, with mean 1 over these."""
        counts = labels.bincount(minlength=outputs).float()
        present = counts > 0
        return torch.where(present, counts.sum() / (present.sum() * counts.clamp_min(1)), 0.0)

    def supervised(self, out: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(out, labels)

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
        if self.compares_by == "dkd":
            weights = self.weights_of_distance
            return decoupled(student, teacher, labels, temperature, detach=detach, **weights)
        if self.compares_by == "dist":
            return correlation(student, teacher, temperature, detach=detach, **self.weights_of_distance)
        measured = standardized if self.compares_by == "standardized" else kl
        return measured(student, teacher, temperature, eps=eps, detach=detach)

    def soft(
        self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, *, detach: bool = True
    ) -> Tensor:
        if not self.compares_as_usual:
            raise RecipeError(
                f"--distance {self.compares_by}: with these settings the method has a cross-entropy with soft labels "
                "in place of a distance. Choose the variant of the method that has one (okdc methods NAME)."
            )
        return soft_cross_entropy(student, teacher, temperature, detach=detach)

    def scorer(self, outputs: int, others: int = 0) -> ClassScorer:
        return ClassScorer(outputs, others)

    def guessing(self, counts: Tensor) -> float:
        return 1 / len(counts)

    def tally(self) -> ClassTally:
        return ClassTally()

    def detail(self, counts: Tensor | None, names: Sequence[str]) -> dict[str, Any]:
        return {"confusion": None if counts is None else confusion.summary(counts, names)}

    def notable(self, out: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The surer a prediction, the more it tells."""
        odds, named = out.float().softmax(1).max(1)
        return named == labels, odds

    def said(self, out: Tensor, names: Sequence[str]) -> list[tuple[str, float]]:
        odds, named = out.float().softmax(0).max(0)
        return [(names[int(named)], 100 * float(odds))]

    def truth(self, label: Tensor, names: Sequence[str]) -> list[str]:
        return [names[int(label)]]

    def facts(self) -> dict[str, Any]:
        return {}


TASK = Classify
