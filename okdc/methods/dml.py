"""Peer networks that learn from labels and from each other's predictions.

Paper: Y. Zhang, T. Xiang, T. Hospedales, H. Lu, Deep Mutual Learning, CVPR 2018, arXiv 1706.00384.
Code: YingZhangDUT/Deep-Mutual-Learning (TensorFlow) and its PyTorch ports (read, not copied).
Differs: all peers are updated at once from one forward pass, as every port does; the paper's algorithm alternates.
    Targets are constants. OKDDip's port has one target per peer, the mean of the others' logits (target=mean; the paper
    finds it weaker), lets the gradient into it (detach_teacher=False) and adds 1e-7 to its probabilities (eps).
    The target network is what ships, always peer 0.
Costs: one whole network per peer, in training only.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from okdc.cohort import Cohort, CohortOutput
from okdc.methods.shared.base import Method


class Dml(Method):
    """L_i = CE(z_i, y) + w / (M - 1) * sum over j != i of KL(z_j || z_i), summed over the M peers.

    With target=mean it is CE(z_i, y) + w * KL(mean over j != i of z_j || z_i).
    """

    members = 2
    share = "none"
    tasks = ("classify", "multilabel")

    def __init__(
        self,
        cohort: Cohort,
        *,
        temperature: float = 1.0,
        weight: float = 1.0,
        target: Literal["each", "mean"] = "each",
        eps: float = 0.0,
        detach_teacher: bool = True,
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.weight = weight
        self.target = target
        self.eps = eps
        self.detach_teacher = detach_teacher

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        parts = {}
        for i, name in enumerate(self.cohort.names):
            others = [z for j, z in enumerate(out.logits) if j != i]
            taught = others if self.target == "each" else [torch.stack(others).mean(0)]
            mutual = torch.stack([self._distance(out.logits[i], z, labels) for z in taught]).mean()
            parts[f"ce/{name}"] = self.task.supervised(out.logits[i], labels)
            parts[f"kl/{name}"] = self.weight * mutual
        return parts

    def _distance(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.task.distance(student, teacher, labels, self.temperature, eps=self.eps, detach=self.detach_teacher)
