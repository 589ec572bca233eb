"""Copies a trained teacher: your network learns from labels and from the predictions of the teacher.

Use it when you have a good network for the same classes (--teacher runs/NAME). It is the usual, offline way, and the
baseline for the methods that need no teacher.

Paper: G. Hinton, O. Vinyals, J. Dean, Distilling the Knowledge in a Neural Network, 2014, arXiv 1503.02531.
Code: megvii-research/mdistiller was read, and not copied. Its weights of the losses for CIFAR-100 are the defaults.
Differs: Nothing. The teacher sees the images as your network does (its size and normalisation), always in evaluation
    mode. It is not part of the checkpoints: a run that is resumed loads it again by its name.
Costs: The teacher runs once per step, without gradients. Before that, somebody has to train it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from okdc.anatomy import inspect
from okdc.cohort import Cohort, CohortOutput, Cost
from okdc.methods.shared.base import Method


class Kd(Method):
    """L = ce_weight * CE(z, y) + kd_weight * T^2 * KL(teacher || z)."""

    members = 1
    needs_teacher = True
    tasks = ("classify", "multilabel", "pose")

    def __init__(
        self,
        cohort: Cohort,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        # In a tuple, so that it is no part of this module: not trained, counted, saved, or put into training mode.
        self._teacher = (teacher.eval().requires_grad_(False),)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            taught = self.task.result(self._teacher[0](images))
        out = self.cohort(images)
        return self.losses(CohortOutput(out.logits, teacher=taught), labels) | self._earlier(out, labels)

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        assert out.teacher is not None
        return {
            "ce/target": self.ce_weight * self.task.supervised(out.logits[0], labels),
            "kd/target": self.kd_weight * self.task.distance(out.logits[0], out.teacher, labels, self.temperature),
        }

    def costs(self) -> tuple[Cost, ...]:
        teacher = inspect(self._teacher[0], self.cohort.anatomy.input_size)
        own = Cost("teacher", teacher.params, teacher.params, teacher.flops, teacher.name, frozen=True)
        return (*self.cohort.costs, own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves the method to a device or a memory layout moves the teacher too."""
        self._teacher[0]._apply(fn, recurse)
        return super()._apply(fn, recurse)
