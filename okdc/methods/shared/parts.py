"""What several methods build of the same thing."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import isqrt

import torch.nn.functional as F
from torch import Tensor, nn

from okdc.losses import rampup
from okdc.methods.shared.base import Method


class Ensemble(nn.Module):
    """All that a method trains as one network: a copy of it, images (B, C, H, W) to what its ensemble says (B, C)."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = copy.deepcopy(method)
        self.method.zero_grad()

    def forward(self, images: Tensor) -> Tensor:
        return self.method.ensemble(self.method.cohort(images))


def ramp(method: Method, rampup_epochs: int | None) -> Tensor:
    """How much of the distillation counts in this epoch, 0 to 1: it rises over `rampup_epochs`.

    None is the share of the run that ONE's CIFAR release made customary, 80 of 300 epochs.
    """
    return rampup(method.epoch, method.epochs * (80 / 300) if rampup_epochs is None else rampup_epochs)


def on_one_grid(maps: Sequence[Tensor], aspect: float) -> list[Tensor]:
    """Feature maps (B, D, H, W) of several networks, average-pooled to the smallest H and W among them.

    Tokens (B, D, N, 1) are first laid out as the grid of patches that they are; `aspect` is H / W of the images.
    """
    grids = [_as_grid(x, aspect) for x in maps]
    size = min(x.shape[2] for x in grids), min(x.shape[3] for x in grids)
    return [x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in grids]


def _as_grid(x: Tensor, aspect: float) -> Tensor:
    """The last H * W of N tokens, the largest grid of the images' shape; class and register tokens stand before."""
    tokens = x.shape[2]
    if x.shape[3] > 1 or tokens == 1:
        return x
    width = min(tokens, max(1, isqrt(int(tokens / aspect + 1e-6))))
    height = max(1, min(tokens // width, round(width * aspect)))
    return x[:, :, tokens - height * width :].unflatten(2, (height, width)).squeeze(-1)
