"""Peer networks that learn from labels and from each other's predictions.

Paper: Y. Zhang, T. Xiang, T. Hospedales, H. Lu, Deep Mutual Learning, CVPR 2018, arXiv 1706.00384.
Code: YingZhangDUT/Deep-Mutual-Learning (TensorFlow) and its PyTorch ports (read, not copied).
Differs: all peers are updated at once from one forward pass, as every port does; the paper's algorithm alternates.
    Targets are constants (one port lets the gradient into them). The target network is what ships, always peer 0.
Costs: one whole network per peer, in training only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from okdc.cohort import Cohort, CohortOutput
from okdc.losses import cross_entropy, kl
from okdc.methods._base import Method


class Dml(Method):
    """L_i = CE(z_i, y) + w / (M - 1) * sum over j != i of KL(z_j || z_i), summed over the M peers."""

    members = 2
    share = "none"

    def __init__(self, cohort: Cohort, *, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.weight = weight

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        parts = {}
        for i, name in enumerate(self.cohort.names):
            others = [z for j, z in enumerate(out.logits) if j != i]
            mutual = torch.stack([kl(out.logits[i], z, self.temperature) for z in others]).mean()
            parts[f"ce/{name}"] = cross_entropy(out.logits[i], labels)
            parts[f"kl/{name}"] = self.weight * mutual
        return parts
