"""Branches that learn to tell each image's embedding in one another's memory from those of other classes.

Paper: C. Yang, Z. An, Y. Xu, Multi-view Contrastive Learning for Online Knowledge Distillation, arXiv 2006.04093, 2020.
Code: winycg/MCL-OKD (read, not copied): embedding heads, memory banks, criterion, sampling, weights, both recipes.
Differs: the one peer that learns from the mean of all, and ships, is the target, member 0 (the code's is the last).
    Banks are saved, so that a run resumes exactly. Heads take each member's own width. negatives is 256, as the authors
    set it for ResNet and DenseNet; their code's default, and what they set for larger networks, is 16384. As in their
    CIFAR code an image is drawn once at most, unless the classes have too few others; replacement=true is their
    ImageNet code, and the cheaper draw where there are very many images.
Costs: the tail (last two stages) once more per branch, a linear head per member. Memory: members x N x width x 4 bytes
    of banks (0.1 GB for CIFAR, 2.6 GB for ImageNet), as much again to undo a skipped step, and in checkpoints; members
    x B x (1 + negatives) x width x 4 bytes in a step; without replacement B x N random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.cohort import Cohort, CohortOutput
from okdc.losses import cross_entropy, kl, memory_scores, nce
from okdc.methods.shared.base import Method
from okdc.needs import Needs
from okdc.ranks import drawn_together, gather


class MclOkd(Method):
    """Multi-view Contrastive Learning: each member's embeddings are held against the others' memory of all images."""

    members = 4
    taps = ("embedding",)

    classes: Tensor
    order: Tensor
    starts: Tensor
    counts: Tensor
    banks: Tensor

    def __init__(
        self,
        cohort: Cohort,
        *,
        train_labels: Tensor,
        temperature: float = 3.0,
        alpha: float = 1.0,
        beta: float = 0.025,
        gamma: float = 1.0,
        tau: float = 0.1,
        width: int = 128,
        negatives: int = 256,
        replacement: bool = False,
        positive: Literal["exact", "relax"] = "exact",
        momentum: float = 0.5,
        distill_all: bool = False,
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.tau = tau
        self.negatives = negatives
        self.positive = positive
        self.momentum = momentum
        self.distill_all = distill_all
        self.heads = nn.ModuleList(nn.Linear(inputs, width) for inputs in cohort.embedding_widths)
        counts = train_labels.bincount(minlength=cohort.anatomy.num_classes)
        self.register_buffer("classes", train_labels, persistent=False)
        self.register_buffer("order", train_labels.argsort(stable=True), persistent=False)  # images, class by class
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
        self.register_buffer("counts", counts, persistent=False)
        self.replacement = replacement or negatives > len(train_labels) - int(counts.max())
        banks = torch.empty(len(cohort), len(train_labels), width)
        self.register_buffer("banks", banks.uniform_(-1, 1) * (3 / width) ** 0.5)  # rows of norm 1 on average

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        return Needs(indices=True)

    @classmethod
    def private_stages(cls, anatomy: Anatomy) -> int:
        return 2

    def forward(self, images: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        out = self.cohort(images)
        embeddings = self.embed(out)
        parts = self.contrastive_losses(out.logits, embeddings, labels, drawn_together(self.draw, indices))
        if self.training:
            self.remember(embeddings, indices)
        return parts

    def embed(self, out: CohortOutput) -> list[Tensor]:
        """The members' embeddings (B, width), of length 1."""
        with torch.autocast(out.logits[0].device.type, enabled=False):  # what banks keep needs the precision
            wide = [head(x.to(self.banks.dtype)) for head, x in zip(self.heads, out.embeddings, strict=True)]
            return [F.normalize(x, dim=1) for x in wide]

    def draw(self, indices: Tensor) -> Tensor:
        """Images (B, 1 + K) to hold images (B,) against: one of the same class, then K drawn from all other classes."""
        classes, total = self.classes[indices, None], len(self.order)
        start, count = self.starts[classes], self.counts[classes]
        others = total - count
        if self.replacement:
            place = self._below(others, self.negatives)
        else:
            chance = torch.rand(len(indices), total, device=indices.device)
            beyond = torch.arange(total, device=indices.device) >= others
            place = chance.masked_fill(beyond, -1).topk(self.negatives).indices
        negatives = self.order[place + count * (place >= start)]  # over the images of the class itself
        positive = indices[:, None] if self.positive == "exact" else self.order[start + self._below(count, 1)]
        return torch.cat([positive, negatives], 1)

    def contrastive_losses(
        self, logits: Sequence[Tensor], embeddings: Sequence[Tensor], labels: Tensor, rows: Tensor
    ) -> dict[str, Tensor]:
        """Labels teach all, the mean logits teach the target, and all banks but its own teach each embedding."""
        names, mean = self.cohort.names, torch.stack(list(logits)).mean(0)
        parts = {f"ce/{name}": self.gamma * cross_entropy(z, labels) for name, z in zip(names, logits, strict=True)}
        for name, z in zip(names if self.distill_all else names[:1], logits):
            parts[f"kd/{name}"] = self.alpha * kl(z, mean, self.temperature)
        found: list[list[Tensor]] = [[] for _ in names]
        for i, bank in enumerate(self.banks):
            memory = bank[rows]  # gathered once for all that are held against it
            for j, embedding in enumerate(embeddings):
                if j != i:
                    found[j].append(nce(memory_scores(memory, embedding, self.tau), len(bank)))
        return parts | {f"nce/{name}": self.beta * torch.stack(x).sum() for name, x in zip(names, found, strict=True)}

    @torch.no_grad()
    def remember(self, embeddings: Sequence[Tensor], indices: Tensor) -> None:
        """Move the rows of the images (B,) towards their embeddings (B, width)."""
        indices, embeddings = gather(indices), [gather(each.detach()) for each in embeddings]
        # An image that stands in a batch twice leaves its last embedding, in whatever order a device writes.
        last = (torch.arange(len(indices), device=indices.device) * (indices[:, None] == indices)).amax(1)
        new = torch.stack(list(embeddings))[:, last]
        old = self.banks[:, indices]
        moved = F.normalize(self.momentum * old + (1 - self.momentum) * new, dim=2)
        self.banks[:, indices] = torch.where(moved.isfinite().all(2, keepdim=True), moved, old)

    def _below(self, limit: Tensor, count: int) -> Tensor:
        """Uniform integers (B, count) from 0 to below `limit` (B, 1)."""
        return torch.randint(2**62, (len(limit), count), device=limit.device) % limit
