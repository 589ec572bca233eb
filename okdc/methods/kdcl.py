"""Gives each network its own view of an image; all learn one soft target that is made of all their predictions.

Use it when you can afford a whole further network. Each network sees an augmentation of its own, and the networks may
be of several architectures (--peers).

Paper: Q. Guo, X. Wang, Y. Wu, Z. Yu, D. Liang, X. Hu, P. Luo, Online Knowledge Distillation via Collaborative Learning,
    CVPR 2020, pp. 11020-11029.
Code: The authors published none.
Differs: soft_target names the paper's four ways to make the target. minlogit is the default, as it needs neither a
    solver nor images set aside. The mixture of `linear` is found by damped Newton steps, whatever solver the paper
    used. `general` starts with the mean, and weighs the members from the second epoch on; a ridge of 1e-6 keeps its
    matrix invertible. Its error is that of all probabilities, or of the true class alone (error=true_class): the paper
    can be read both ways.
Costs: Each peer is one whole network, and one more augmentation of each image. `general` looks at images set aside once
    per epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from okdc.cohort import Cohort, CohortOutput
from okdc.losses import cross_entropy
from okdc.methods.shared.base import Method
from okdc.needs import Needs
from okdc.ranks import mean_

SoftTarget = Literal["naive", "linear", "minlogit", "general"]


class Kdcl(Method):
    """L = sum_i CE(z_i, y) + weight * KL(z_t || z_i), with one soft target z_t for all."""

    members = 2
    share = "none"

    mixture: Tensor

    def __init__(
        self,
        cohort: Cohort,
        *,
        soft_target: SoftTarget = "minlogit",
        temperature: float = 2.0,
        weight: float = 1.0,
        error: Literal["probabilities", "true_class"] = "probabilities",
    ) -> None:
        super().__init__(cohort)
        self.soft_target = soft_target
        self.temperature = temperature
        self.weight = weight
        self.error = error
        self.register_buffer("mixture", torch.full((len(cohort),), 1 / len(cohort)))  # of `general`, by member

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        return Needs(views=True, held_out=settings.get("soft_target") == "general")

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        taught = self.teach(out.logits, labels)
        parts = {f"ce/{name}": cross_entropy(z, labels) for name, z in zip(self.cohort.names, out.logits, strict=True)}
        for name, z in zip(self.cohort.names, out.logits, strict=True):
            parts[f"kd/{name}"] = self.weight * self.task.distance(z, taught, labels, self.temperature)
        return parts

    @torch.no_grad()
    def teach(self, logits: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """The soft target, as logits (B, C), of the members' logits and the labels, (B,) or (B, C)."""
        stacked = _stack(logits)
        generators = {"naive": naive, "linear": linear, "minlogit": minlogit}
        with torch.autocast(stacked.device.type, enabled=False):  # the solver needs the precision
            if self.soft_target == "general":
                return torch.einsum("m,mbc->bc", self.mixture.to(stacked.dtype), stacked)
            return generators[self.soft_target](stacked, _probabilities(labels, stacked))

    def before_epoch(self, held_out: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure how the members' errors go together on images set aside, and mix the members so that they cancel."""
        if self.epoch == 0:  # networks that know nothing err alike, and any mixture of them is as good as any other
            return
        errors = self.mixture.new_zeros(len(self.cohort), len(self.cohort))
        for images, labels in held_out:
            logits = _stack(self.cohort(images).logits)
            with torch.autocast(logits.device.type, enabled=False):
                errors += joint_errors(logits, _probabilities(labels, logits), self.error == "true_class")
        mean_([errors])  # of all ranks, each of which saw a share of the images; their scale does not matter
        self.mixture.copy_(least_error(errors.double().cpu()))


def naive(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of whoever has the lowest cross entropy, per image; here and below (M, B, C), (B, C) to (B, C)."""
    best = -(F.log_softmax(logits, 2) * labels).sum(2)
    return logits[best.argmin(0), torch.arange(logits.shape[1], device=logits.device)]


def minlogit(logits: Tensor, labels: Tensor) -> Tensor:
    """For every class the smallest lead z_i[j] - z_i[label] over the members, so that the label's own entry is 0."""
    return _leads(logits, labels).amin(0)


def linear(logits: Tensor, labels: Tensor) -> Tensor:
    """The mixture of the members' logits with the lowest cross entropy, per image."""
    return torch.einsum("bm,mbc->bc", best_mixture(logits, labels), logits)


def best_mixture(logits: Tensor, labels: Tensor, steps: int = 30, barrier: float = 1e-6) -> Tensor:
    """Weights (B, M), at least 0 with sum 1, whose mixture of logits (M, B, C) has the lowest cross entropy.

    Newton's method with a logarithmic barrier that shrinks to `barrier`, the most by which the loss is too high per
    member. Steps are damped by the range of the change in logits, which bounds how wrong the quadratic model is.
    """
    leads = _leads(logits, labels).transpose(0, 1).double()  # the barrier is lost in the rounding of float32
    alpha = leads.new_full(leads.shape[:2], 1 / leads.shape[1])
    for i in range(steps):
        mu = 0.1 * (10 * barrier) ** (i / (steps - 1))
        q = torch.softmax((alpha.unsqueeze(2) * leads).sum(1), 1).unsqueeze(1)
        mean = (q * leads).sum(2)
        centred = leads - mean.unsqueeze(2)
        hessian = (q * centred) @ centred.transpose(1, 2) + torch.diag_embed(mu / alpha**2)
        sides = torch.stack([mean - mu / alpha, torch.ones_like(alpha)], 2)
        newton, even = torch.linalg.solve_ex(hessian, sides)[0].unbind(2)
        step = even * (newton.sum(1, keepdim=True) / even.sum(1, keepdim=True)) - newton  # its sum is 0
        change = (step.unsqueeze(2) * leads).sum(1)
        spread = (change.amax(1) - change.amin(1)).clamp_min(1e-3)
        room = 0.9 / (-step / alpha).amax(1).clamp_min(0.9)
        alpha = alpha + torch.minimum(room, torch.log1p(spread) / spread).unsqueeze(1) * step
    return (alpha / alpha.sum(1, keepdim=True)).to(logits.dtype)


def joint_errors(logits: Tensor, labels: Tensor, true_class: bool = False) -> Tensor:
    """Sums over images of products of two members' errors (M, M): logits (M, N, C), labels (N, C)."""
    probabilities = F.softmax(logits, 2)
    if true_class:
        wrong = 1 - (probabilities * labels).sum(2, keepdim=True)
    else:
        wrong = probabilities - labels
    return torch.einsum("inc,jnc->ij", wrong, wrong)


def least_error(errors: Tensor, ridge: float = 1e-6) -> Tensor:
    """Weights (M,) with sum 1, maybe negative, that minimise w^T E w for joint errors (M, M), up to their scale."""
    ridged = errors + ridge * errors.diagonal().mean() * torch.eye(len(errors), dtype=errors.dtype)
    weights = torch.linalg.solve(ridged, torch.ones(len(errors), dtype=errors.dtype))
    return weights / weights.sum()


def _leads(logits: Tensor, labels: Tensor) -> Tensor:
    return logits - (logits * labels).sum(2, keepdim=True)


def _stack(logits: tuple[Tensor, ...]) -> Tensor:
    stacked = torch.stack(logits)
    return stacked if stacked.dtype == torch.float64 else stacked.float()


def _probabilities(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels (B,) as one-hot rows (B, C); class probabilities are these already."""
    return (F.one_hot(labels, logits.shape[2]) if labels.dim() == 1 else labels).to(logits.dtype)
