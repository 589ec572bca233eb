"""Trains whole networks that embed images of one class close together, and imitate each other's embeddings.

Use it when embeddings matter, such as for search, and lmcl is too expensive: this looks at the last embedding only.

Paper: C. Yang, Z. An, L. Cai, Y. Xu, Mutual Contrastive Learning for Visual Representation Learning, AAAI 2022, doi
    10.1609/aaai.v36i3.20211, arXiv 2104.12565.
Code: winycg/MCL was read, and not copied: its loss, sampler, memory and commands.
Differs: Your network is member 0. With three members or more and logit_kd, it is the one that learns from the mean
    logits (in the code the last one does). An image without another of its class in the batch is left out of the
    contrast, where the code gives NaN. Negatives of the memory are drawn on the device and by the labels, not by the
    data set.
Mixup: The authors do without. With --mixup or --cutmix the contrast of an image that is of two is share L(first) +
    (1 - share) L(second), as in i-Mix (Lee et al., ICLR 2021) and MixCo (Kim et al. 2020). Their candidates are not
    mixed. Those of a batch are here, and count as positives by their shares of the anchor's class. Rows of the memory
    are for one image each: a mixed image moves the row of the one that it has more of, by 2 share - 1 of what a whole
    one would, so half and half moves none. No run of ours shows what it gains.
Costs: One whole network more (or, with members=3 and more, the last two stages of each), and a head of two small layers
    per member. memory=true keeps an embedding of every training image for each network, width x 4 bytes, and reads 8194
    of them for each image, twice as many with mixup. bank_dtype=float16 halves what is kept: numbers are rounded to 11
    bits, and still compared in float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.losses import cross_entropy
from okdc.methods.shared.base import Method
from okdc.methods.shared.contrast import Bank, EmbeddingHead, mutual_contrast
from okdc.methods.shared.mixing import Mixed, of_classes
from okdc.needs import Needs


class Mcl(Method):
    """Mutual Contrastive Learning on the last embedding: within the batch, or with `memory` against a memory bank."""

    train_labels: Tensor | None

    share = "none"
    taps = ("embeddings",)

    def __init__(
        self,
        cohort: Cohort,
        *,
        memory: bool = False,
        vcl: float = 0.1,
        soft_vcl: float = 1.0,
        icl: float = 0.1,
        soft_icl: float = 1.0,
        tau: float = 0.1,
        temperature: float = 3.0,
        logit_kd: bool = False,
        width: int = 128,
        negatives: int = 8192,
        memory_momentum: float = 0.5,
        bank_dtype: Literal["float32", "float16"] = "float32",
        train_labels: Tensor | None = None,
    ) -> None:
        super().__init__(cohort)
        self.weights = {"vcl": vcl, "soft_vcl": soft_vcl, "icl": icl, "soft_icl": soft_icl}
        self.tau = tau
        self.temperature = temperature
        self.logit_kd = self.compares = logit_kd
        self.heads = nn.ModuleList(EmbeddingHead(inputs, width) for inputs in cohort.embedding_widths)
        self.bank = None
        if memory:
            self.bank = Bank(train_labels, len(cohort), width, negatives, memory_momentum, dtype=bank_dtype)
        self.register_buffer("train_labels", train_labels, persistent=False)

    def forward(
        self, images: Tensor, labels: Tensor, indices: Tensor | None = None, shares: Tensor | None = None
    ) -> dict[str, Tensor]:
        out = self.cohort(images)
        embeddings = self.embeddings(out)
        if self.bank is None:
            return self.mutual_losses(
                out.logits, embeddings, labels, None, of_classes(self.train_labels, indices, shares)
            )
        assert indices is not None  # `needs` asked for them
        rows, mixed = self.bank.held(self.bank.draw_each(indices), shares)
        parts = self.mutual_losses(out.logits, embeddings, labels, rows, mixed)
        if self.training:
            self.bank.update(indices, embeddings, shares)
        return parts

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        return self.mutual_losses(out.logits, self.embeddings(out), labels)

    def embeddings(self, out: CohortOutput) -> list[Tensor]:
        """Unit vectors (B, d) of every member."""
        return [head(x) for head, x in zip(self.heads, out.embeddings, strict=True)]

    def mutual_losses(
        self,
        logits: tuple[Tensor, ...],
        embeddings: list[Tensor],
        labels: Tensor,
        rows: list[Tensor] | None = None,
        mixed: Mixed | None = None,
    ) -> dict[str, Tensor]:
        """Spec section 4 on logits (B, C) and embeddings (B, d) of the members, candidates as in `mutual_contrast`."""
        parts = {f"ce/{name}": cross_entropy(z, labels) for name, z in zip(self.cohort.names, logits, strict=True)}
        if self.logit_kd:
            teacher = torch.stack(logits).mean(0)
            for name, z in list(zip(self.cohort.names, logits))[: 2 if len(logits) == 2 else 1]:
                parts[f"kd/{name}"] = self.task.distance(z, teacher, labels, self.temperature)
        terms = mutual_contrast(
            [e[None] for e in embeddings], labels, rows, tau=self.tau, temperature=self.temperature, mixed=mixed
        )._asdict()
        terms["vcl"] = terms["vcl"] / (len(logits) - 1)  # each network's own contrast counts once, not in every pair
        return parts | {name: weight * terms[name] for name, weight in self.weights.items()}

    @classmethod
    def needs(cls, *, memory: bool = False, **settings: Any) -> Needs:
        return Needs(indices=True, mixed=True) if memory else Needs(pairs=True, mixed=True)

    @classmethod
    def plan(
        cls, anatomy: Anatomy, *, members: int | None = None, share: str | None = None, **further: Any
    ) -> list[Branch]:
        """Two members are whole networks; more share a trunk, as the paper's four do."""
        share = share or ("trunk" if (members or cls.members) > 2 else "none")
        return super().plan(anatomy, members=members, share=share, **further)

    @classmethod
    def private_stages(cls, anatomy: Anatomy) -> int:
        return 2
