"""Adds branches to a shared trunk. Their predictions, combined by a small gate, teach each of them.

Use it when you want to begin: it is one of the cheapest methods, and needs nothing but a network that can be cut. The
gate decides for each image how much each member counts.

Paper: X. Lan, X. Zhu, S. Gong, Knowledge Distillation by On-the-Fly Native Ensemble, NeurIPS 2018, arXiv 1806.04606.
Code: The authors' CIFAR release was read, and not copied: gate, loss loop and ramp; so was the variant in OKDDip's
    repository.
Differs: The ramp is the code's share of the run, 80 of 300 epochs (rampup_epochs fixes it); the paper is said to have
    none (rampup_epochs=0). Nothing else differs from the authors' code. OKDDip's variant lets the gradient of the
    distillation into the ensemble as well (detach_teacher=False).
Costs: Each branch runs the tail once more. The gate has a few hundred parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from okdc.cohort import Cohort, CohortOutput
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import ramp


class Gate(nn.Module):
    """Weights of the M members for each image, (B, M), from what the trunk gave, (B, D, H, W); rows sum to 1."""

    def __init__(self, width: int, members: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, members)
        self.bn = nn.BatchNorm1d(members)

    def forward(self, shared: Tensor) -> Tensor:
        return F.softmax(F.relu(self.bn(self.fc(shared.mean((2, 3))))), dim=1)


class One(Method):
    """L = sum_i CE(z_i, y) + CE(z_e, y) + w * sum_i KL(z_e || z_i), with the gated ensemble z_e = sum_i a_i z_i."""

    members = 3
    taps = ("shared",)
    tasks = ("classify", "multilabel", "pose")

    def __init__(
        self,
        cohort: Cohort,
        *,
        temperature: float = 3.0,
        kd_weight: float = 1.0,
        rampup_epochs: int | None = None,
        eps: float = 1e-7,
        detach_teacher: bool = True,
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.rampup_epochs = rampup_epochs
        self.eps = eps
        self.detach_teacher = detach_teacher
        self.gate = Gate(cohort.shared_width, len(cohort))

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        return self.ensemble_losses(out.logits, self.ensemble(out), labels)

    def ensemble_losses(self, branches: Sequence[Tensor], ensemble: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Spec section 6 on logits (B, C) of the M branches and of their ensemble."""
        weight = self.kd_weight * ramp(self, self.rampup_epochs)
        parts = {"ce/ensemble": self.task.supervised(ensemble, labels)}
        for name, logits in zip(self.cohort.names, branches, strict=True):
            parts[f"ce/{name}"] = self.task.supervised(logits, labels)
            distance = self.task.distance(
                logits, ensemble, labels, self.temperature, eps=self.eps, detach=self.detach_teacher
            )
            parts[f"kd/{name}"] = weight * distance
        return parts

    def ensemble(self, out: CohortOutput) -> Tensor:
        """Logits (B, C) of the members, weighted by the gate."""
        assert out.shared is not None
        return self.task.blend(self.gate(out.shared), out.logits)
