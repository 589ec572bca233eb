"""Adds branches whose embeddings are compared with what the other branches remember of all training images.

Use it when you have memory to spare and a data set that okdc reads image by image: it keeps an embedding of every
training image for each member. It does not work with streams, nor with a loader of your own.

Paper: C. Yang, Z. An, Y. Xu, Multi-view Contrastive Learning for Online Knowledge Distillation, arXiv 2006.04093, 2020.
Code: winycg/MCL-OKD was read, and not copied: embedding heads, memory banks, criterion, sampling, weights and both
    recipes.
Differs: The one member that learns from the mean of all, and ships, is your network, member 0 (in the code it is the
    last). Banks are saved, so that a run resumes exactly. Heads take each member's own width. negatives is 256, as the
    authors set it for ResNet and DenseNet; their code's default, which they also set for larger networks, is 16384. As
    in their CIFAR code, an image is drawn once at most, unless the classes have too few others. replacement=true is
    their ImageNet code. --mixup and --cutmix, which the authors do without, give share L(first) + (1 - share) L(second)
    of each loss with the banks, Z being each one's own, and move rows as in mcl (okdc methods mcl).
Costs: Each branch runs the tail (the last two stages) once more, and each member has a linear head. Memory: banks take
    members x N x width x 4 bytes (0.1 GB for CIFAR, 2.6 GB for ImageNet), also in checkpoints. A step takes members x B
    x (1 + negatives) x width x 4 bytes, twice that with mixup. bank_dtype=float16 halves what banks take: numbers are
    rounded to 11 bits, and still compared in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.cohort import Cohort, CohortOutput
from okdc.losses import all_memory_scores, cross_entropy, nce
from okdc.methods.shared.base import Method
from okdc.methods.shared.contrast import Bank
from okdc.needs import Needs


class MclOkd(Method):
    """Multi-view Contrastive Learning: each member's embeddings are held against the others' memory of all images."""

    members = 4
    taps = ("embeddings",)

    def __init__(
        self,
        cohort: Cohort,
        *,
        train_labels: Tensor | None,
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
        bank_dtype: Literal["float32", "float16"] = "float32",
        distill_all: bool = False,
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.tau = tau
        self.positive = positive
        self.distill_all = distill_all
        self.heads = nn.ModuleList(nn.Linear(inputs, width) for inputs in cohort.embedding_widths)
        self.bank = Bank(train_labels, len(cohort), width, negatives, momentum, replacement, bank_dtype)

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        return Needs(indices=True, mixed=True)

    @classmethod
    def private_stages(cls, anatomy: Anatomy) -> int:
        return 2

    def forward(  # type: ignore[override]
        self, images: Tensor, labels: Tensor, indices: Tensor, shares: Tensor | None = None
    ) -> dict[str, Tensor]:
        out = self.cohort(images)
        embeddings = self.embed(out)
        rows = [self.drawn(each) for each in self.bank.draw_each(indices)]
        others = None if shares is None else rows[1]
        parts = self.contrastive_losses(out.logits, embeddings, labels, rows[0], others, shares)
        if self.training:
            self.bank.update(indices, embeddings, shares)
        return parts

    def embed(self, out: CohortOutput) -> list[Tensor]:
        """The members' embeddings (B, width), of length 1."""
        with torch.autocast(out.logits[0].device.type, enabled=False):  # what banks keep needs the precision
            dtype = next(self.heads.parameters()).dtype
            wide = [head(x.to(dtype)) for head, x in zip(self.heads, out.embeddings, strict=True)]
            return [F.normalize(x, dim=1) for x in wide]

    def draw(self, indices: Tensor) -> Tensor:
        """Images (B, 1 + K) to hold images (B,) against: one of the same class, then K drawn from all other classes."""
        return self.drawn(self.bank.draw(indices))

    def drawn(self, images: Tensor) -> Tensor:
        """The one positive of images (B, 2 + K) that a bank drew, and the negatives."""
        itself, alike, negatives = images.tensor_split((1, 2), 1)
        return torch.cat([itself if self.positive == "exact" else alike, negatives], 1)

    def contrastive_losses(
        self,
        logits: Sequence[Tensor],
        embeddings: Sequence[Tensor],
        labels: Tensor,
        rows: Tensor,
        others: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Labels teach all, the mean logits teach the target, and all banks but its own teach each embedding.

        `rows` (B, 1 + K) are of images in the banks; of mixed images `others` are for the sake of the second, and
        `shares` (B,) those of the first.
        """
        names, mean = self.cohort.names, torch.stack(list(logits)).mean(0)
        parts = {f"ce/{name}": self.gamma * cross_entropy(z, labels) for name, z in zip(names, logits, strict=True)}
        for name, z in zip(names if self.distill_all else names[:1], logits):
            parts[f"kd/{name}"] = self.alpha * self.task.distance(z, mean, labels, self.temperature)
        found: list[list[Tensor]] = [[] for _ in names]
        sets = [(rows, shares)]
        if others is not None and shares is not None:
            sets.append((others, 1 - shares))
        held: list[tuple[Tensor, Tensor]] = []
        told: list[tuple[int, Tensor | None]] = []
        for drawn, weights in sets:
            memories = self.bank.gather(drawn)
            for i, j in permutations(range(len(names)), 2):
                held.append((memories[i], embeddings[j]))
                told.append((j, weights))
        for (j, weights), scores in zip(told, all_memory_scores(held, self.tau), strict=True):
            found[j].append(nce(scores, len(self.bank.order), weights=weights))
        return parts | {f"nce/{name}": self.beta * torch.stack(x).sum() for name, x in zip(names, found, strict=True)}
