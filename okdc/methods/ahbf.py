"""Adds branches, each deeper than the one before; the combined predictions of deeper ones teach the shallower ones.

Use it when training may take about three times as long. It is what okdc takes if you name none. Branch by branch,
predictions are combined into teaching assistants. Each assistant teaches its own branch and the assistant before it.
The first assistant is your network itself.

Paper: L. Gong et al., Adaptive Hierarchy-Branch Fusion for Online Knowledge Distillation, AAAI 2023, doi
    10.1609/aaai.v37i6.25937.
Code: linruigong965/AHBF of 2023-11-29 and 2023-03-03: the fusion classes, the loss loop of train_ahbf.py and its ramp
    were read, and not copied, as there is no licence.
Differs: preset=okdc, the default, gives a branch one block more than the one before, where the README has four, and
    merges maps at the width of the last blocks, where a MobileNet's head is several times as wide (docs/results.md).
    preset=release is the code of the first release: four blocks more, as wide as the maps; its ramp, which all but head
    have, ends with the run and peaks at 1. preset=head is today's code: two blocks, a kd_weight of 0.75, a ramp of 240
    epochs. Gradients are clipped to 5, and the code does not clip (--clip-grad 0): without, it hardly trained on few
    images at plain training's rate. Both lambdas are those of the README (2 and 4). Every branch of a MobileNet gets
    its own blocks (the code reuses those of branch 0). As in the code, gradients also flow into the teaching side
    (detach_teacher changes that), and an assistant also learns from the next branch.
Costs: Each branch runs the tail once more, with up to (M - 1) x extra blocks. Each fusion is one 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import SEModule
from timm.layers.cbam import ChannelAttn
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.anatomy.shapes import layout
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.losses import rampup
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import on_one_grid

Attention = Literal["none", "se", "cbam"]
Preset = Literal["okdc", "release", "head"]


class Form(NamedTuple):
    """What a preset stands for."""

    kd_weight: float
    rampup_epochs: int | None  # None: as many as the run has
    extra_blocks: int
    narrow: bool  # merge maps at the width of the last blocks, where a MobileNet's head is several times as wide


FORMS = {  # okdc's own, and the authors' code, then and now
    "okdc": Form(1.0, None, 1, narrow=True),
    "release": Form(1.0, None, 4, narrow=False),
    "head": Form(0.75, 240, 2, narrow=False),
}


class SpatialAttention(nn.Module):
    """Weights each pixel by sigmoid(conv7x7 of [mean over D, max over D]), x (B, D, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(summary))


class Fusion(nn.Module):
    """Merges the assistant so far with the next branch: a new feature map, and gated logits (spec section 4).

    width: channels of the new map; as in the paper those of the branch, if not given.
    """

    def __init__(
        self, assistant_width: int, branch_width: int, attention: Attention = "none", width: int | None = None
    ) -> None:
        super().__init__()
        width = width or branch_width
        self.conv = nn.Conv2d(assistant_width + branch_width, width, 1)
        self.bn = nn.BatchNorm2d(width)
        self.attention = _attention(attention, width)
        self.gate_fc = nn.Linear(width, 2)
        self.gate_bn = nn.BatchNorm1d(2)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, assistant: tuple[Tensor, Tensor], branch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Feature map (B, D, H, W) and logits (B, C, ...) of both, in that order; the same of the new assistant."""
        feature = self.attention(self.bn(self.conv(torch.cat([assistant[0], branch[0]], 1))))
        gate = self.gate(feature)
        gate = gate.view(*gate.shape, *[1] * (branch[1].dim() - 2))  # heat maps have pixels, too
        return feature, gate[:, :1] * assistant[1] + gate[:, 1:] * branch[1]

    def gate(self, feature: Tensor) -> Tensor:
        """Weights (B, 2) of the assistant's and the branch's logits, from the merged map (B, D, H, W)."""
        return F.softmax(F.relu(self.gate_bn(self.gate_fc(feature.mean((2, 3))))), dim=1)


def _attention(kind: Attention, width: int) -> nn.Module:
    if kind == "se":
        return SEModule(width, rd_ratio=1 / 16, rd_divisor=1, bias=False)
    if kind == "cbam":
        return nn.Sequential(ChannelAttn(width, rd_ratio=1 / 16, rd_divisor=1), SpatialAttention())
    return nn.Identity()


def _width_of_blocks(anatomy: Anatomy) -> int | None:
    """Channels behind the last stage's last block that can be repeated; None where there is none."""
    blocks = anatomy.stages[-1].blocks
    shape = next((c.output for c in anatomy.calls if blocks and c.name == blocks[-1][-1]), None)
    if shape is None or len(shape) not in (2, 3):
        return None
    height, width = anatomy.input_size[-2:]
    return shape[0] if layout(shape, height / width) == "nchw" else shape[-1]


class Ahbf(Method):
    """Adaptive Hierarchy-Branch Fusion: branches of growing depth, a chain of fusion modules, the target ships."""

    members = 4
    extra_blocks = FORMS["okdc"].extra_blocks
    clip_grad = 5.0  # its deep branches give the trunk many times plain training's gradient: docs/results.md
    taps = ("feature_maps",)
    tasks = ("classify", "multilabel", "pose")

    def __init__(
        self,
        cohort: Cohort,
        *,
        preset: Preset = "okdc",
        temperature: float = 3.0,
        lambda_assistant: float = 2.0,
        lambda_branch: float = 4.0,
        kd_weight: float | None = None,
        rampup_epochs: int | None = None,
        eps: float = 1e-7,
        detach_teacher: bool = False,
        attention: Attention = "none",
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.lambda_assistant = lambda_assistant
        self.lambda_branch = lambda_branch
        form = FORMS[preset]
        self.kd_weight = form.kd_weight if kd_weight is None else kd_weight
        self.rampup_epochs = form.rampup_epochs if rampup_epochs is None else rampup_epochs
        self.eps = eps
        self.detach_teacher = detach_teacher
        limit = _width_of_blocks(cohort.anatomy) if form.narrow else None
        assistant, *branches = cohort.feature_widths
        self.fusions = nn.ModuleList()
        for branch in branches:
            width = min(branch, limit or branch)
            self.fusions.append(Fusion(assistant, branch, attention, width))
            assistant = width

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        return self.chain_losses(out.logits, self.assistants(out), labels)

    def chain_losses(
        self, branches: Sequence[Tensor], assistants: Sequence[Tensor], labels: Tensor
    ) -> dict[str, Tensor]:
        """Spec section 6 on logits (B, C) of the M branches and of the M assistants, of which the first is branch 0."""
        parts = {
            f"ce/{name}": self.task.supervised(z, labels) for name, z in zip(self.cohort.names, branches, strict=True)
        }
        parts |= {f"ce/assistant{i}": self.task.supervised(t, labels) for i, t in enumerate(assistants) if i > 0}
        ramp = rampup(self.epoch, self.epochs if self.rampup_epochs is None else self.rampup_epochs)
        from_assistant, from_branch = torch.zeros_like(ramp), torch.zeros_like(ramp)
        for now, following, branch in zip(assistants, assistants[1:], branches[1:]):
            from_assistant = from_assistant + self._kd(now, following, labels) + self._kd(branch, following, labels)
            from_branch = from_branch + self._kd(now, branch, labels)
        parts["kd/assistant"] = self.kd_weight * self.lambda_assistant * ramp * from_assistant
        parts["kd/branch"] = self.kd_weight * self.lambda_branch * ramp * from_branch
        return parts

    def assistants(self, out: CohortOutput) -> list[Tensor]:
        """Logits (B, C) of the M teaching assistants; the first is the target itself, the last the whole cohort's."""
        maps: Sequence[Tensor] = out.feature_maps
        if len({x.shape[2:] for x in maps}) > 1:  # of peer networks; the paper's branches end at one size
            height, width = self.cohort.anatomy.input_size[1:]
            maps = on_one_grid(maps, height / width)
        assistant = (maps[0], out.logits[0])
        logits = [out.logits[0]]
        for i, fusion in enumerate(self.fusions):
            assistant = fusion(assistant, (maps[i + 1], out.logits[i + 1]))
            logits.append(assistant[1])
        return logits

    def ensemble(self, out: CohortOutput) -> Tensor:
        return self.assistants(out)[-1]

    def _kd(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.task.distance(student, teacher, labels, self.temperature, eps=self.eps, detach=self.detach_teacher)

    @classmethod
    def plan(
        cls, anatomy: Anatomy, *, preset: Preset = "okdc", extra_blocks: int | None = None, **others: Any
    ) -> list[Branch]:
        """As every method's; a branch has as many blocks more than the one before as the preset says."""
        extra = FORMS[preset].extra_blocks if extra_blocks is None else extra_blocks
        return super().plan(anatomy, extra_blocks=extra, **others)

    @classmethod
    def private_stages(cls, anatomy: Anatomy) -> int:
        plain = anatomy.stages[-1].plain  # a VGG parts before its last group, however many it has
        return 2 if len(anatomy.stages) >= 4 and not plain else 1

    @classmethod
    def depth(cls, branch: int, stages: int, extra: int) -> tuple[int, ...]:
        return tuple(extra * ((branch + stages - 1 - s) // stages) for s in range(stages))
