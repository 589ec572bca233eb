"""Trains whole networks side by side. Each learns from labels and from the predictions of the others.

Use it when you want the simplest method, or networks of several architectures that teach each other (--peers). Nothing
is shared, so it works for networks that cannot be cut.

Paper: Y. Zhang, T. Xiang, T. Hospedales, H. Lu, Deep Mutual Learning, CVPR 2018, arXiv 1706.00384.
Code: YingZhangDUT/Deep-Mutual-Learning (TensorFlow) and its PyTorch ports were read, and not copied.
Differs: All peers are updated at once from one forward pass, as every port does; the paper's algorithm alternates.
    Targets are constants. OKDDip's port has one target per peer, the mean of the others' logits (target=mean; the paper
    finds it weaker), lets the gradient into it (detach_teacher=False) and adds 1e-7 to its probabilities (eps). Your
    network, always peer 0, is what ships.
Costs: Each peer is one whole network, in training only.
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
    tasks = ("classify", "multilabel", "pose")

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
