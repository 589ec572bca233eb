"""Trains your network together with ever narrower copies of it, and exports them all.

Use it when you want networks of several sizes from one training. The mean of all predictions teaches all of them; the
feature maps of the widest, your network, teach the narrower ones. It needs okdc[prune].

Paper: D. Walawalkar, Z. Shen, M. Savvides, Online Ensemble Model Compression using Knowledge Distillation, ECCV 2020,
    doi 10.1007/978-3-030-58529-7_2, arXiv 2011.07449.
Code: Devwalkar/BOC-KD was read, and not copied: the combined loss, the student networks and the optimizer of the
    adaptation layers.
Differs: The students are part of the module, so that validation, saving and evaluation mode reach them (the code keeps
    them in a list that none of these reach). The adaptation layers are there from the first step, with half the
    learning rate (the code adds them after an epoch, and forgets all momentum then). Channels are truncated as in the
    code, without EfficientNet's rounding to 8. As there, its last map is the one behind the head's convolution, maps
    differ by their element mean, and the divergence is times T^2 (t_squared=false is the paper as printed). A residual
    stream that comes out of the shared stem keeps its width unless its first block has a projection, as in ResNets:
    Vision Transformers and ConvNeXt's first stage are narrowed in their inner widths, and attention by whole heads.
Costs: For five students, the stem runs once and the rest takes about 2.2 times what it takes for one. Each student has
    one 1x1 convolution per stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.errors import RecipeError
from okdc.losses import feature_mse
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import on_one_grid


class Oemc(Method):
    """Online Ensemble Model Compression: the target is the widest student; the narrower ones are byproducts."""

    members = 5
    taps = ("stage_maps",)
    tasks = ("classify", "multilabel", "pose")

    def __init__(
        self,
        cohort: Cohort,
        *,
        alpha: float = 0.7,
        beta: float = 0.15,
        gamma: float = 0.15,
        temperature: float = 2.0,
        t_squared: bool = True,
        reduce: Literal["sum", "mean"] = "sum",
        ratios: list[float] | None = None,
    ) -> None:
        super().__init__(cohort)
        if ratios is not None and tuple(ratios) != cohort.widths:
            raise RecipeError(f"ratios {ratios} are not the cohort's widths {list(cohort.widths)}. Leave out --peers.")
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.temperature = temperature
        self.t_squared = t_squared
        self.reduce = reduce
        own, *others = cohort.stage_widths
        if any(len(widths) != len(own) for widths in others):
            raise RecipeError(
                f"oemc compares the students stage by stage, and theirs are {[len(w) for w in cohort.stage_widths]}. "
                "Give --peers with as many stages as the network has, or leave them out."
            )
        if len(cohort) > 1:
            cohort.extract(1)  # what could not ship is refused before it is trained
        self.adapt = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, wanted, 1) for width, wanted in zip(widths, own)) for widths in others
        )

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        names = self.cohort.names
        soft = self.gamma if self.t_squared else self.gamma / self.temperature**2
        mean = self.ensemble(out)
        parts = {
            f"ce/{name}": self.alpha * self.task.supervised(z, labels)
            for name, z in zip(names, out.logits, strict=True)
        }
        for name, fits in zip(names[1:], self.map_losses(out.stage_maps), strict=True):
            parts[f"map/{name}"] = self.beta * torch.stack(fits).sum()
        parts |= {
            f"kd/{name}": soft * self.task.distance(z, mean, labels, self.temperature)
            for name, z in zip(names, out.logits, strict=True)
        }
        if self.reduce == "mean":
            terms = {"ce": len(names), "kd": len(names), "map": sum(map(len, out.stage_maps[1:]))}
            parts = {key: value / terms[key.partition("/")[0]] for key, value in parts.items()}
        return parts

    def map_losses(self, maps: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """How far each narrower student's adapted maps (B, D, H, W) are from the target's, by student and stage."""
        height, width = self.cohort.anatomy.input_size[1:]
        losses: list[list[Tensor]] = []
        for layers, own in zip(self.adapt, maps[1:], strict=True):
            losses.append([])
            for adapt, student, target in zip(layers, own, maps[0], strict=True):  # type: ignore[call-overload]
                if student.shape[2:] != target.shape[2:]:  # a peer of another architecture
                    student, target = on_one_grid([student, target], height / width)
                losses[-1].append(feature_mse(adapt(student), target))
        return losses

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        networks = [p for p in self.cohort.parameters() if p.requires_grad]
        return [{"params": networks, "lr": lr}, {"params": list(self.adapt.parameters()), "lr": 0.5 * lr}]

    def byproducts(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {}
        for i, (name, width) in enumerate(zip(self.cohort.names, self.cohort.widths, strict=True)):
            if i > 0:
                label = f"width-{width:.3g}"
                networks[f"{label}-{name}" if label in networks else label] = self.cohort.extract(i)
        return networks

    @classmethod
    def plan(
        cls,
        anatomy: Anatomy,
        *,
        members: int | None = None,
        private_stages: int | None = None,
        cut: str | None = None,
        share: str | None = None,
        ratios: list[float] | None = None,
        **others: Any,
    ) -> list[Branch]:
        """As every method's, each branch with its width: those of `ratios` (1 first, the target's), or (S - s) / S."""
        if ratios is not None:
            members = len(ratios) if members is None else members
            if len(ratios) != members or ratios[0] != 1 or not all(0 < ratio <= 1 for ratio in ratios):
                raise RecipeError(
                    f"ratios were given as {ratios}; expected one per member ({members}), above 0 and at most 1, the "
                    "target's 1 first, such as [1, 0.8, 0.6, 0.4, 0.2]."
                )
        place = cut or (stem(anatomy) if private_stages is None else None)
        branches = super().plan(
            anatomy, members=members, private_stages=private_stages, cut=place, share=share, **others
        )
        if any(branch.network for branch in branches):
            return branches
        students = len(branches) + 1
        widths = ratios or [(students - s) / students for s in range(students)]
        return [replace(branch, width=width) for branch, width in zip(branches, widths[1:], strict=True)]

    @classmethod
    def asks(cls) -> list[str]:
        return [*super().asks(), "okdc[prune]"]

    @classmethod
    def private_stages(cls, anatomy: Anatomy) -> int:
        return len(anatomy.stages)


def stem(anatomy: Anatomy) -> str | None:
    """The cut behind the first layer that computes and its norm, activation and pooling; None where there is none."""
    layers = sorted((c for c in anatomy.calls if c.leaf and c.flops_end > c.flops_start), key=lambda c: c.start)
    ends = {c.name: c.end for c in anatomy.calls}
    if len(layers) < 2:
        return None
    found = [c.name for c in anatomy.cuts if layers[0].end <= ends[c.name] < layers[1].start]
    return min(reversed(found), key=lambda name: name.count("."), default=None)
