"""Contrast of images that mixup or cutmix made of two: share L(first) + (1 - share) L(second).

This is what i-Mix does (Lee et al., ICLR 2021, arXiv 2010.08887), and MixCo (Kim et al. 2020, arXiv 2010.06300). Their
candidates are not mixed. Those of a batch are here, and each counts by its shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from okdc.ranks import gather


class Mixed(NamedTuple):
    """Of what the images of a batch are mixed; what is not asked for is None."""

    shares: Tensor
    """(B,), of the first of the two."""
    classes: Tensor | None = None
    """(B, 2), where candidates are the batch."""
    rows: Sequence[Tensor] | None = None
    """(B, K, d) of each network's bank, for the sake of the second."""


def of_classes(train_labels: Tensor | None, indices: Tensor | None, shares: Tensor | None) -> Mixed | None:
    """The classes of mixed images, indices (B, 2), of all training labels (N,); None where they are not mixed."""
    if shares is None:
        return None
    assert train_labels is not None and indices is not None  # only okdc's own data mix
    return Mixed(shares, train_labels[indices])


def positives(mixed: Mixed, others: Tensor, dtype: torch.dtype) -> Tensor:
    """How much each candidate (B, N) counts among an anchor's positives; `others` (B, N) leave its own one out.

    Of each of an anchor's two classes the candidates, by their shares of it, together count as much as it has itself;
    nothing does where no other has it.
    """
    assert mixed.classes is not None
    shares = torch.stack([mixed.shares, 1 - mixed.shares], 1).to(dtype)
    alike = mixed.classes[:, :, None, None] == gather(mixed.classes)  # (B, 2, N, 2)
    there = (gather(shares) * alike).sum(-1) * others[:, None]
    whole = there.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    return (shares[:, :, None] * there / whole).sum(1)
