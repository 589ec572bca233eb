"""For key points: branches on a shared trunk are taught by their heat maps, fused by weights that a unit reads off it.

Use it when you train key points (--task pose) and want more than labels alone. A branch is little more than a head, so
that it costs little. Whether it helps on your images, okdc compare says.

Paper: Z. Li, J. Ye, M. Song, Y. Huang, Z. Pan, Online Knowledge Distillation for Efficient Pose Estimation, ICCV 2021,
    arXiv 2108.02092.
Code: zhengli97/OKDHP, MPII path (read, not copied): the feature aggregation unit, both losses, their assembly.
Differs: every branch's own final maps are fused (the code takes the last three outputs, and so leaves a branch out).
    The published soft loss has no temperature and is divided by pixels, which makes its gradient a hundredth of that of
    the labels; the default here is temperature 0.1, a mean over labelled points, and a target that is constant.
    Parity: fau=coded temperature=1 reduction=official kd_weight=2 ens_weight=1 rampup_epochs=90 detach_target=False
    fau_lr_scale=1.
    fau=light makes the map narrow before the three convolutions, which are then depthwise; the average pool that the
    paper draws as a fourth is in neither. The unit learns at a tenth of the rate (fau_lr_scale).
Costs: the tail once more per branch, and the unit: as coded 83 weights per pair of the map's channels, light a few
    ten thousand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.errors import RecipeError
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import ramp
from okdc.tasks.pose import Pose
from okdc.tasks.shared import heatmaps

KERNELS = (3, 5, 7)
SQUEEZE = 64  # width between the pooled map and the weights
MIN_HEAD = 0.03  # of the FLOPs: less is no head of heat maps
Form = Literal["light", "coded"]


class FeatureAggregation(nn.Module):
    """Weights (B, M, K) of the M members' maps for each key point, from what the trunk gave, (B, D, H, W)."""

    def __init__(self, width: int, members: int, keypoints: int, form: Form = "light", squeeze: int = SQUEEZE) -> None:
        super().__init__()
        light = form == "light"
        inner = min(width, SQUEEZE) if light else width
        self.narrow = nn.Conv2d(width, inner, 1) if light else nn.Identity()
        self.scales = nn.ModuleList(_scale(inner, kernel, light) for kernel in KERNELS)
        self.squeeze = nn.Linear(inner, squeeze)
        self.members = nn.ModuleList(nn.Linear(squeeze, keypoints) for _ in range(members))

    def forward(self, shared: Tensor) -> Tensor:
        shared = self.narrow(shared)
        pooled = torch.stack([scale(shared) for scale in self.scales]).sum(0).mean((2, 3))
        squeezed = self.squeeze(pooled)
        return F.softmax(torch.stack([member(squeezed) for member in self.members], 1), dim=1)


def _scale(width: int, kernel: int, light: bool) -> nn.Sequential:
    """What one kernel sees of the map (B, D, H, W): convolution, norm, ReLU."""
    if not light:
        return nn.Sequential(nn.Conv2d(width, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False),
        nn.Conv2d(width, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class Okdhp(Method):
    """L = sum_r MSE(m_r, y) + ens_weight * MSE(m_e, y) + kd_weight * w * sum_r KL(m_e || m_r), with the fused maps m_e.

    Each map is a distribution over its pixels in KL; points without a label leave all three.
    """

    members = 3
    taps = ("shared",)
    tasks = ("pose",)

    def __init__(
        self,
        cohort: Cohort,
        *,
        fau: Form = "light",
        temperature: float = 0.1,
        reduction: heatmaps.Reduction = "mean",
        kd_weight: float = 1.0,
        ens_weight: float = 1.0,
        rampup_epochs: int | None = None,
        detach_target: bool = True,
        fau_lr_scale: float = 0.1,
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.reduction: heatmaps.Reduction = reduction
        self.kd_weight = kd_weight
        self.ens_weight = ens_weight
        self.rampup_epochs = rampup_epochs
        self.detach_target = detach_target
        self.fau_lr_scale = fau_lr_scale
        self.fau = FeatureAggregation(cohort.shared_width, len(cohort), cohort.anatomy.num_classes, fau)

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        fused = self.ensemble(out)
        assert isinstance(self.task, Pose)  # `tasks` says so
        targets, weights = self.task.maps.targets(labels, fused.shape[2:])
        maps = dict(zip(self.cohort.names, out.logits, strict=True))
        return self.heat_map_losses(maps, fused, targets, weights)

    def heat_map_losses(
        self, maps: Mapping[str, Tensor], fused: Tensor, targets: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """The three losses of maps (B, K, h, w) by name, and of the fused ones; weights (B, K) of the labels."""
        kd = self.kd_weight * ramp(self, self.rampup_epochs)
        parts = {"mse/ensemble": self.ens_weight * heatmaps.mse(fused, targets, weights)}
        for name, each in maps.items():
            parts[f"mse/{name}"] = heatmaps.mse(each, targets, weights)
            distance = heatmaps.kl(
                each, fused, weights, self.temperature, reduction=self.reduction, detach=self.detach_target
            )
            parts[f"kd/{name}"] = kd * distance
        return parts

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        networks = [p for p in self.cohort.parameters() if p.requires_grad]
        return [{"params": networks, "lr": lr}, {"params": list(self.fau.parameters()), "lr": self.fau_lr_scale * lr}]

    def ensemble(self, out: CohortOutput) -> Tensor:
        """Maps (B, K, h, w) of the members, weighted by the unit."""
        assert out.shared is not None
        return self.task.blend(self.fau(out.shared), out.logits)

    @classmethod
    def plan(
        cls, anatomy: Anatomy, *, private_stages: int | None = None, cut: str | None = None, **others: Any
    ) -> list[Branch]:
        """As every method's, but the backbone is shared whole, as the paper's light networks do, unless asked."""
        place = cut or (backbone(anatomy) if private_stages is None else None)
        return super().plan(anatomy, private_stages=private_stages, cut=place, **others)

    @classmethod
    def depth(cls, branch: int, stages: int, extra: int) -> tuple[int, ...]:
        if extra and not stages:
            raise RecipeError(
                f"--extra-blocks {extra}: the branches share the whole backbone, and a head has no block to repeat. "
                "Give them a stage of their own: --private-stages 1"
            )
        return (*(0 for _ in range(stages - 1)), extra * branch)[:stages]  # unbalanced, with 2: 4, 6 and 8 stacks


def backbone(anatomy: Anatomy) -> str | None:
    """The outermost module that the last stage is in, if that is a cut that leaves a head worth training."""
    outermost = anatomy.stages[-1].last.partition(".")[0]
    return next((cut.name for cut in anatomy.cuts if cut.name == outermost and cut.flops_after >= MIN_HEAD), None)
