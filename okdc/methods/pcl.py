"""Gives each branch its own view of an image; one classifier of all, and running means of the others, teach each one.

Use it when you can afford a pass of the whole network for each member. What ships is the running mean of your network.
The mean of the combined classifier is exported too.

Paper: G. Wu, S. Gong, Peer Collaborative Learning for Online Knowledge Distillation, AAAI 2021, pp. 10302-10310, arXiv
    2006.04147.
Code: The authors published none. shaoeric's reimplementation was read, and not copied.
Differs: The running means start as a copy of the cohort, not as a network of their own. The reimplementation divides
    the ramp by its height instead of its length, and starts all classifiers alike: both are mended. The ramp is a share
    of the run, 80 of 300 epochs (rampup_epochs fixes it). The running mean of your network ships, with the batch-norm
    statistics that it gathered itself; ship=own gives the trained one, and ema_buffers=copy or average other
    statistics. The classifier of PCL-E is a running mean as well.
Costs: Each member is a whole pass, as every view has its own, and one more without gradients. There is a second copy of
    everything.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from okdc.cohort import Cohort, CohortOutput, Cost
from okdc.losses import cross_entropy
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import ramp
from okdc.needs import Needs


class EnsembleHead(nn.Linear):
    """One classifier of all members' embeddings (B, D_i), side by side: logits (B, C)."""

    def forward(self, embeddings: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat(list(embeddings), 1))


class PclEnsemble(nn.Module):
    """Copies of a cohort and of its head, as one network: images (B, C, H, W) to the head's logits (PCL-E)."""

    def __init__(self, cohort: Cohort, head: EnsembleHead) -> None:
        super().__init__()
        self.cohort = copy.deepcopy(cohort)
        self.head = copy.deepcopy(head)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.cohort(images).embeddings)


class Pcl(Method):
    """Peer Collaborative Learning: labels teach all, the ensemble teaches each, and the averages of the others do."""

    members = 3
    taps = ("embeddings",)

    def __init__(
        self,
        cohort: Cohort,
        *,
        temperature: float = 3.0,
        kd_weight: float = 1.0,
        rampup_epochs: int | None = None,
        decay: float = 0.999,
        ema_buffers: Literal["own", "copy", "average"] = "own",
        ship: Literal["mean", "own"] = "mean",
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.rampup_epochs = rampup_epochs
        self.decay = decay
        self.ema_buffers = ema_buffers
        self.ship = ship
        self.steps = 0
        self.head = EnsembleHead(sum(cohort.embedding_widths), cohort.anatomy.num_classes)
        self.mean = PclEnsemble(cohort, self.head).requires_grad_(False)
        for norm in self.mean.modules() if ema_buffers != "own" else ():
            if isinstance(norm, _BatchNorm):
                norm.momentum = 0.0  # its statistics come from the cohort alone

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        return Needs(views=True)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.cohort(images)
        with torch.no_grad():
            means = self.mean.cohort(images).logits
        return self.collaborative_losses(out.logits, self.ensemble(out), means, labels)

    def collaborative_losses(
        self, members: Sequence[Tensor], ensemble: Tensor, means: Sequence[Tensor], labels: Tensor
    ) -> dict[str, Tensor]:
        """Spec section 5 on logits (B, C) of the members, of their ensemble, and of the average of each member."""
        weight = self.kd_weight * ramp(self, self.rampup_epochs)
        parts = {"ce/ensemble": cross_entropy(ensemble, labels)}
        for i, (name, z) in enumerate(zip(self.cohort.names, members, strict=True)):
            others = [self.task.distance(z, mean, labels, self.temperature) for j, mean in enumerate(means) if j != i]
            parts[f"ce/{name}"] = cross_entropy(z, labels)
            parts[f"kd/{name}"] = weight * self.task.distance(z, ensemble, labels, self.temperature)
            parts[f"mean/{name}"] = weight * torch.stack(others).mean()
        return parts

    def ensemble(self, out: CohortOutput) -> Tensor:
        """Logits (B, C) of the classifier of all embeddings."""
        return self.head(out.embeddings)

    @torch.no_grad()
    def after_step(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Move the averages towards the cohort: a running mean at first, later one that forgets."""
        self.steps += 1
        weight = max(1 / self.steps, 1 - self.decay)
        means: list[Tensor] = [*self.mean.cohort.parameters(), *self.mean.head.parameters()]
        torch._foreach_lerp_(means, [*self.cohort.parameters(), *self.head.parameters()], weight)
        if self.ema_buffers == "own":
            return
        for mean, own in zip(self.mean.cohort.buffers(), self.cohort.buffers(), strict=True):
            averaged = self.ema_buffers == "average" and mean.is_floating_point()
            mean.lerp_(own, weight) if averaged else mean.copy_(own)

    def costs(self) -> tuple[Cost, ...]:
        whole = self.cohort.costs[0].flops  # each member runs the trunk for itself, on its own view
        members = tuple(replace(cost, flops=whole) for cost in self.cohort.costs)
        means = (replace(cost, name=f"mean {cost.name}", frozen=True) for cost in members)
        return (*members, *means)

    @classmethod
    def cost(cls) -> str:
        return f"{cls.members} networks, {cls.members} averages"

    @property
    def student(self) -> nn.Module:
        return self.mean.cohort.target if self.ship == "mean" else self.cohort.target

    def byproducts(self) -> dict[str, nn.Module]:
        """PCL-E: the averaged members and the average of their classifier."""
        return {"ensemble": copy.deepcopy(self.mean)}

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)
