"""Lets the end of a frozen teacher grow anew, as a bridge that learns from the teacher and together with your network.

Use it when you have a trained, larger network for the same classes (--teacher runs/NAME), and want what teaches to
adapt while your network learns. The bridge stands between the two, and is exported too.

Paper: Z. Liu, Y. Liu, C. Huang, Semi-Online Knowledge Distillation, 2021, arXiv 2111.11747.
Code: swlzq/Semi-Online-KD was read, and not copied. It has logits only, and Wide ResNets for CIFAR-100.
Differs: The teacher's batch norm is at rest (teacher_mode=train is the code's way: batch statistics, which overwrite
    the teacher's own). The bridge can be cut off any teacher, and starts as a new network would. The paper announces
    distances of feature maps, and the code lacks them; here `distance` names them: maps are pooled to the smaller grid
    and take the place of the logits, and fitnet's adapter is a 1x1 convolution with batch norm. The teacher is part of
    the checkpoints, frozen.
Costs: In each step the teacher runs once without gradients, its tail once more with them, and your network. Before
    that, somebody has to train the teacher. The bridge on the teacher's trunk is a by-product, of the teacher's own
    architecture.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort, CohortOutput, Cost
from okdc.cohort.birth import reborn
from okdc.errors import RecipeError
from okdc.losses import attention_transfer, cross_entropy, feature_mse, similarity
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import on_one_grid

# What distances of feature maps are multiplied by, as is usual for each.
_OF_MAPS = {"at": (attention_transfer, 1000.0), "fitnet": (feature_mse, 100.0), "sp": (similarity, 3000.0)}


class Sokd(Method):
    """L = CE(z, y) + KD(z, bridge) + CE(bridge, y) + KD(bridge, teacher) + KD(bridge, z), the second ones constants."""

    members = 1
    needs_teacher = True
    taps = ("feature_maps",)  # looked at where the distance is one of maps

    def __init__(
        self,
        cohort: Cohort,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        bridge_ce_weight: float = 1.0,
        bridge_teacher_weight: float = 1.0,
        bridge_target_weight: float = 1.0,
        distance: Literal["logits", "at", "fitnet", "sp"] = "logits",
        bridge_depth: int = 1,
        bridge_init: Literal["random", "teacher"] = "random",
        bridge_lr: float = 1.0,
        teacher_mode: Literal["eval", "train"] = "eval",
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.bridge_ce_weight = bridge_ce_weight
        self.bridge_teacher_weight = bridge_teacher_weight
        self.bridge_target_weight = bridge_target_weight
        self.distance = distance
        self.compares = distance == "logits"
        self.bridge_lr = bridge_lr
        self.teacher_mode = teacher_mode
        if bridge_depth < 1:
            raise RecipeError(f"bridge_depth is {bridge_depth}: expected 1 or more of the teacher's last stages.")
        taps = self.taps if distance != "logits" else ()
        self.bridge = _bridge(teacher, cohort.anatomy.input_size, bridge_depth, bridge_init == "random", taps)
        self.bridge.extract(1)  # what could not ship is refused before it is trained
        self.adapter: nn.Module = nn.Identity()
        if distance == "fitnet":
            inputs, outputs = cohort.feature_widths[0], self.bridge.feature_widths[0]
            self.adapter = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self.mutual_losses(self.cohort(images), self.bridge(images), labels)

    def mutual_losses(self, out: CohortOutput, beside: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        """The losses of the target's output and of the output of the teacher with its bridge."""
        target, teacher, bridge = self._compared(out, beside)
        return {
            "ce/target": self.ce_weight * cross_entropy(out.logits[0], labels),
            "kd/target": self.kd_weight * self._apart(target, bridge, labels),
            "ce/bridge": self.bridge_ce_weight * cross_entropy(beside.logits[1], labels),
            "kd/bridge_from_teacher": self.bridge_teacher_weight * self._apart(bridge, teacher, labels),
            "kd/bridge_from_target": self.bridge_target_weight * self._apart(bridge, target, labels),
        }

    def _compared(self, out: CohortOutput, beside: CohortOutput) -> tuple[Tensor, Tensor, Tensor]:
        """What target, teacher and bridge are compared by: logits (B, C), or maps (B, D, H, W) on one grid."""
        if self.distance == "logits":
            return out.logits[0], beside.logits[0], beside.logits[1]
        height, width = self.cohort.anatomy.input_size[1:]
        target, teacher, bridge = on_one_grid([*out.feature_maps, *beside.feature_maps], height / width)
        return self.adapter(target), teacher, bridge

    def _apart(self, learner: Tensor, model: Tensor, labels: Tensor) -> Tensor:
        if self.distance == "logits":
            return self.task.distance(learner, model, labels, self.temperature)
        distance, weight = _OF_MAPS[self.distance]
        return weight * distance(learner, model)

    def costs(self) -> tuple[Cost, ...]:
        teacher, bridge = self.bridge.costs
        teacher = replace(teacher, name="teacher", grown=type(self.bridge.target).__name__, frozen=True)
        return (*self.cohort.costs, teacher, replace(bridge, name="bridge"))

    @classmethod
    def cost(cls) -> str:
        return f"{super().cost()}, 1 bridge"

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        bridge = [p for p in self.bridge.parameters() if p.requires_grad]
        own = [p for part in (self.cohort, self.adapter) for p in part.parameters() if p.requires_grad]
        return [{"params": own, "lr": lr}, {"params": bridge, "lr": lr * self.bridge_lr}]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.teacher_mode == "eval":
            self.bridge.target.eval()
        return self

    def byproducts(self) -> dict[str, nn.Module]:
        """The teacher's trunk with the bridge: the teacher's architecture, under the teacher's own keys."""
        return {"bridge": self.bridge.extract(1)}

    def strip(self) -> nn.Module:
        self.bridge.strip()
        return super().strip()


def _bridge(teacher: nn.Module, input_size: tuple[int, ...], depth: int, anew: bool, taps: tuple[str, ...]) -> Cohort:
    """The teacher, frozen, with one branch of its last `depth` stages, which learns; nothing else of it does."""
    first = next(teacher.parameters())
    example = torch.randn(2, *input_size, device=first.device, dtype=first.dtype)
    anatomy = inspect(teacher, example)
    teacher.requires_grad_(True)  # a branch learns what its original does
    fresh = (lambda: reborn(teacher)) if anew else (lambda: copy.deepcopy(teacher))
    bridge = Cohort(teacher, example, [Branch(anatomy.cut(depth))], taps=taps, fresh=fresh, anatomy=anatomy)
    teacher.requires_grad_(False)
    return bridge
