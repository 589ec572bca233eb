"""Adds branches; each learns from its own mixture of them all, and your network learns from their mean.

Use it when you want branches that stay different from each other, which is the paper's aim, for little more than plain
branches cost. An attention decides for each image how much each branch counts for each other one.

Paper: D. Chen, J.-P. Mei, C. Wang, Y. Feng, C. Chen, Online Knowledge Distillation with Diverse Peers, AAAI 2020, doi
    10.1609/aaai.v34i04.5746, arXiv 1912.00350.
Code: DefangChen/OKDDip-AAAI2020 was read, and not copied: branch networks, attention, train_GL.py and its ramp.
Differs: The leader, which learns from the mean of the others, is your network, member 0 (in the code it is the last
    branch). The ramp is the code's share of the run, 80 of 300 epochs (rampup_epochs fixes it). As in the code,
    gradients also flow into what teaches; the attention learns in no other way. detach=logits keeps them from the
    logits that are mixed, and leaves the attention its own. The code mixes logits, the paper softened probabilities
    (mix=prob). loss=ce is the code's other loss, without the 1e-7. Every DenseNet branch has a tail of its own.
Costs: Each peer runs the tail (or a whole network) once more. The attention has 2 x D x D / 8 parameters.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.cohort import Cohort, CohortOutput
from okdc.errors import RecipeError
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import ramp


class Attention(nn.Module):
    """How much each of P peers listens to each: embeddings (B, P, D) to weights (B, P, P) whose rows sum to 1."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        inner = max(1, width // factor)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):  # unscaled products need the precision
            x = embeddings.to(self.query.weight.dtype)
            return torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), dim=2)


class Okddip(Method):
    """Online Knowledge Distillation with Diverse Peers: member 0 is the leader, which ships, the others are peers."""

    members = 4
    taps = ("embeddings",)
    tasks = ("classify", "multilabel", "pose")

    def __init__(
        self,
        cohort: Cohort,
        *,
        temperature: float = 3.0,
        alpha: float = 1.0,
        rampup_epochs: int | None = None,
        factor: int = 8,
        mix: Literal["logits", "prob"] = "logits",
        detach: Literal["none", "logits"] = "none",
        loss: Literal["kl", "ce"] = "kl",
        eps: float = 1e-7,
    ) -> None:
        super().__init__(cohort)
        if mix == "prob" and self.task.name != "classify":
            raise RecipeError("okddip mix=prob mixes distributions over classes. Take mix=logits.")
        self.temperature = temperature
        self.alpha = alpha
        self.rampup_epochs = rampup_epochs
        self.mix = mix
        self.detach = detach
        self.loss = loss
        self.eps = eps
        self.attention = Attention(_common_width(cohort), factor)

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        leader, peers = out.logits[0], torch.stack(out.logits[1:], 1)
        teaching = peers.detach() if self.detach == "logits" else peers
        targets = self.mixtures(teaching, torch.stack(out.embeddings[1:], 1))
        return self.two_level_losses(leader, peers, targets, teaching.mean(1), labels)

    def mixtures(self, peers: Tensor, embeddings: Tensor) -> Tensor:
        """What each peer is taught, as logits (B, P, C, ...): all peers' logits, weighed by their attention."""
        attention = self.attention(embeddings)
        peers = peers.to(attention.dtype)
        if self.mix == "logits":
            return (attention @ peers.flatten(2)).unflatten(2, peers.shape[2:])
        # Softened, these logits are exactly the mixture of the softened probabilities.
        log_p = F.log_softmax(peers / self.temperature, dim=2)
        return self.temperature * torch.logsumexp(attention.log().unsqueeze(3) + log_p.unsqueeze(1), dim=2)

    def two_level_losses(
        self, leader: Tensor, peers: Tensor, targets: Tensor, leader_target: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Level 1: each peer (B, P, C) learns from its own target; level 2: the leader (B, C) learns from one."""
        names = self.cohort.names
        weight = self.alpha * ramp(self, self.rampup_epochs)
        students = (leader, *peers.unbind(1))
        teachers = (leader_target, *targets.unbind(1))
        parts = {f"ce/{name}": self.task.supervised(z, labels) for name, z in zip(names, students, strict=True)}
        for name, student, teacher in zip(names, students, teachers, strict=True):
            parts[f"kd/{name}"] = weight * self._kd(student, teacher, labels)
        return parts

    def _kd(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        if self.loss == "ce":
            return self.temperature**2 * self.task.soft(student, teacher, labels, self.temperature, detach=False)
        return self.task.distance(student, teacher, labels, self.temperature, eps=self.eps, detach=False)

    def ensemble(self, out: CohortOutput) -> Tensor:
        return torch.stack(out.logits[1:]).mean(0)


def _common_width(cohort: Cohort) -> int:
    """The width of the peers' embeddings; RecipeError where attention between them would be nothing or impossible."""
    widths = cohort.embedding_widths[1:]
    if len(widths) < 2:
        raise RecipeError(
            f"okddip was given {len(cohort)} members; expected 3 at least: the target, which is the leader, and two "
            "peers that attend to each other. Use --members 4."
        )
    if len(set(widths)) > 1:
        raise RecipeError(
            f"okddip compares the embeddings of its peers, and theirs have unequal widths {list(widths)}. Give --peers "
            "of one width (the target's own may differ), or use dml or ffl."
        )
    return widths[0]
