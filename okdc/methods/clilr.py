"""Adds branches to a shared trunk. The mean prediction of the others teaches each one.

Use it when you want something simple and cheap: it adds nothing but the branches. The trunk learns from the mean of the
members' gradients, so that its gradients do not grow with the number of members.

Paper: G. Song, W. Chai, Collaborative Learning for Deep Neural Networks (CL), NeurIPS 2018, arXiv 1805.11761. With
    shared layers and rescaled back-propagation it is called CL-ILR.
Code: The authors published none. The re-implementations in MCL-OKD, in OKDDip and for tensorpack were read, and not
    copied.
Differs: All branches part at one place. --cut EARLY,LATE makes the paper's binary tree, with 4 members: two ways from
    the early cut, two from each of the late ones, and gradients are divided at every split. The variants weigh and
    measure the soft loss differently. `paper` is tensorpack's: half of the cross entropy with labels, half of the soft
    one, no T^2. `paper_t2` is the same times T^2, `half_kl` is MCL-OKD's. In all three the labels count half, which
    costs accuracy where epochs are few (docs/results.md, for `paper`). So the default is `ramped_kl`, OKDDip's: both
    losses whole, the soft one by a ramp over 80 of 300 epochs (rampup_epochs). In OKDDip gradients also flow into the
    teaching side (detach_teacher=False).
Costs: Each branch runs the tail once more. There is nothing else.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from okdc.cohort import Cohort, CohortOutput
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import ramp

Variant = Literal["paper", "paper_t2", "half_kl", "ramped_kl"]


class Clilr(Method):
    """L = sum_i CE(z_i, y) + w * soft(z_i, mean of the other z_j); `paper` and two more weigh them beta, 1 - beta."""

    members = 4
    trunk_gradient = "mean"
    tasks = ("classify", "multilabel", "pose")

    def __init__(
        self,
        cohort: Cohort,
        *,
        variant: Variant = "ramped_kl",
        temperature: float | None = None,
        beta: float = 0.5,
        rampup_epochs: int | None = None,
        eps: float = 1e-7,
        detach_teacher: bool = True,
    ) -> None:
        super().__init__(cohort)
        self.variant = variant
        self.ramped = variant == "ramped_kl"  # the one that uses rampup_epochs and eps, and has no beta
        self.temperature = temperature or (3.0 if self.ramped else 2.0)
        self.beta = beta
        self.rampup_epochs = rampup_epochs
        self.eps = eps if self.ramped else 0.0
        self.detach_teacher = detach_teacher

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        hard, soft = self.beta, 1 - self.beta
        if self.ramped:
            hard, soft = 1.0, ramp(self, self.rampup_epochs)  # type: ignore[assignment]
        parts = {}
        for i, name in enumerate(self.cohort.names):
            consensus = torch.stack([z for j, z in enumerate(out.logits) if j != i]).mean(0)
            parts[f"ce/{name}"] = hard * self.task.supervised(out.logits[i], labels)
            parts[f"soft/{name}"] = soft * self.soft(out.logits[i], consensus, labels)
        return parts

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """How far logits (B, C) are from their consensus, as the variant measures it."""
        if self.variant in ("half_kl", "ramped_kl"):
            return self.task.distance(
                student, teacher, labels, self.temperature, eps=self.eps, detach=self.detach_teacher
            )
        scale = self.temperature**2 if self.variant == "paper_t2" else 1.0
        return scale * self.task.soft(student, teacher, labels, self.temperature, detach=self.detach_teacher)
