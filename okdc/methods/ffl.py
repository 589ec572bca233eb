"""Fuses the last feature maps of all members into one further classifier, which teaches them and learns from them.

Use it when you want a cheap method whose combined classifier is worth having too: it is exported as a by-product.
Members may be branches, or networks of several architectures (--peers).

Paper: J. Kim, M. Hyun, I. Chung, N. Kwak, Feature Fusion for Online Mutual Knowledge Distillation, ICPR 2020, doi
    10.1109/ICPR48806.2021.9412615, arXiv 1904.09058.
Code: Jangho-Kim/FFL-pytorch was read, and not copied: the fusion module, the loss and its ramp. It has CIFAR-100 and
    equal networks only.
Differs: The divergence is exact (the code adds 1e-7 to every target probability: eps). The ramp is the code's share of
    the run, 80 of 300 epochs (rampup_epochs fixes it). One optimizer trains everything, the fusion module with its own
    weight decay. Maps of unequal networks are pooled to the smallest grid; the paper allows such networks, and no code
    shows them.
Costs: Each branch runs the tail (or a whole network) once more. The fusion is one depthwise and one 1x1 convolution on
    the last maps. The fused classifier, with all members, is a by-product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.cohort import Cohort, CohortOutput
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import Ensemble, on_one_grid, ramp
from okdc.tasks.task import MAPS


class Fusion(nn.Module):
    """Logits (B, C) of the feature maps (B, D_i, H, W) of all members, or `maps` (B, C, H, W); `inputs`: sum of D_i."""

    def __init__(self, inputs: int, width: int, classes: int, maps: bool = False) -> None:
        super().__init__()
        self.dw = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.bn_dw = nn.BatchNorm2d(inputs)
        self.pw = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn_pw = nn.BatchNorm2d(width)
        self.fc = nn.Conv2d(width, classes, 1) if maps else nn.Linear(width, classes)
        self.maps = maps
        # The code counts all outputs of the depthwise convolution, not those of one group.
        nn.init.normal_(self.dw.weight, std=math.sqrt(2 / (9 * inputs)))
        nn.init.normal_(self.pw.weight, std=math.sqrt(2 / width))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self.bn_dw(self.dw(torch.cat(list(maps), 1))).relu()
        x = self.bn_pw(self.pw(x)).relu()
        return self.fc(x if self.maps else x.mean((2, 3)))


class Ffl(Method):
    """Feature Fusion Learning: fused classifier and sub-networks teach each other; the target ships (FFL-S)."""

    taps = ("feature_maps",)
    tasks = ("classify", "multilabel", "pose")

    def __init__(
        self,
        cohort: Cohort,
        *,
        temperature: float = 3.0,
        kd_weight: float = 1.0,
        rampup_epochs: int | None = None,
        eps: float = 0.0,
        fusion_weight_decay: float = 1e-5,
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.rampup_epochs = rampup_epochs
        self.eps = eps
        self.fusion_weight_decay = fusion_weight_decay
        widths = cohort.feature_widths
        self.fusion = Fusion(sum(widths), widths[0], cohort.anatomy.num_classes, self.task.dims == MAPS)

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        return self.mutual_losses(out.logits, self.ensemble(out), labels)

    def mutual_losses(self, members: Sequence[Tensor], fused: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Labels teach all, the fused logits (B, C) teach the members, and the mean of the members teaches them."""
        names = self.cohort.names
        weight = self.kd_weight * ramp(self, self.rampup_epochs)
        parts = {f"ce/{name}": self.task.supervised(z, labels) for name, z in zip(names, members, strict=True)}
        parts["ce/fused"] = self.task.supervised(fused, labels)
        parts |= {f"kd/{name}": weight * self._kd(z, fused, labels) for name, z in zip(names, members, strict=True)}
        parts["kd/fused"] = weight * self._kd(fused, torch.stack(list(members)).mean(0), labels)
        return parts

    def ensemble(self, out: CohortOutput) -> Tensor:
        height, width = self.cohort.anatomy.input_size[1:]
        fused = self.fusion(on_one_grid(out.feature_maps, height / width))
        size = out.logits[0].shape[2:]  # of heat maps, which may be larger than the feature maps
        return fused if fused.shape[2:] == size else F.interpolate(fused, size, mode="bilinear")

    def byproducts(self) -> dict[str, nn.Module]:
        """The fused classifier with all sub-networks (the paper's FFL)."""
        return {"fused": Ensemble(self)}

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        fusion = list(self.fusion.parameters())
        networks = [p for p in self.cohort.parameters() if p.requires_grad]
        return [
            {"params": networks, "lr": lr},
            {"params": fusion, "lr": lr, "weight_decay": self.fusion_weight_decay},
        ]

    def _kd(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.task.distance(student, teacher, labels, self.temperature, eps=self.eps)
