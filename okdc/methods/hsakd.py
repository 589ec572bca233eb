"""Adds a branch after every stage that has to tell what an image shows and how it was turned, both at once.

Use it when you have time and no teacher. Nothing is copied from another network: each branch learns a harder task, from
labels alone, and what the early layers learn for it is of use to your network. Objects should have an upright pose:
digits, scenes and animals do; images from above and cells do not.

Paper: C. Yang, Z. An, L. Cai, Y. Xu, Hierarchical Self-supervised Augmented Knowledge Distillation, IJCAI 2021, arXiv
    2107.13715: section 3.2, the loss with which its teacher network is trained by itself. Nothing is taken of 3.3, in
    which that network then teaches another one.
Code: winycg/HSAKD was read, and not copied: how it trains its teacher for CIFAR-100 from scratch, and the auxiliary
    classifiers of its WRN. The loss is the same, with a weight of 1 for each part.
Differs: okdc's branches are copies of the stages that follow; theirs have such layers. The last one, which judges the
    network's own embedding, is one linear layer; theirs has one more stage as wide as the last. Weights of classes act
    on the network's own loss alone. Label smoothing and mixup share the joint labels as they share the labels.
Costs: Each image is run in four poses, so a step takes four times as long and as much memory for the network alone, and
    the branches come on top. --members 2 leaves the last branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.cohort import Branch, Cohort, CohortOutput, Cost
from okdc.errors import RecipeError
from okdc.losses import cross_entropy
from okdc.methods.shared.base import Method

TURNS = 4  # by 0, 90, 180 and 270 degrees


class Hsakd(Method):
    """L = CE(z(x), y) + 1/4 sum over 4 turns t and classifiers l of CE(q_l(t(x)), (y, t)), q_l of 4 C joint classes."""

    members = 3
    taps = ("embeddings",)
    compares = False

    def __init__(self, cohort: Cohort, *, joint_weight: float = 1.0) -> None:
        super().__init__(cohort)
        height, width = cohort.anatomy.input_size[1:]
        if height != width:
            raise RecipeError(f"hsakd turns images, and these are {height}x{width}: expected square ones (--img-size).")
        self.joint_weight = joint_weight
        self.joint = nn.Linear(cohort.embedding_widths[0], TURNS * cohort.anatomy.num_classes)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        turned = torch.cat([torch.rot90(images, turn, (-2, -1)) for turn in range(TURNS)])
        return self.losses(self.cohort(turned), labels)

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        joint = [self.joint(out.embeddings[0]), *out.logits[1:]]
        return self.joint_losses(out.logits[0][: len(labels)], joint, labels)

    def joint_losses(self, upright: Tensor, joint: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) of the images as they are, and (4 B, 4 C) of each classifier, one turn of all after another."""
        parts = {"ce/target": cross_entropy(upright, labels)}
        both = joint_labels(labels)
        for name, z in zip(self.learners[1:], joint, strict=True):
            parts[f"joint/{name}"] = self.joint_weight * F.cross_entropy(z.to(parts["ce/target"].dtype), both)
        return parts

    @property
    def learners(self) -> tuple[str, ...]:
        return ("target", "joint", *self.cohort.names[1:])

    def said(self, out: CohortOutput) -> tuple[Tensor, ...]:
        """Of the joint classes those of images that are not turned."""
        joint = (self.joint(out.embeddings[0]), *out.logits[1:])
        return (out.logits[0], *(z.unflatten(1, (-1, TURNS))[:, :, 0] for z in joint))

    def costs(self) -> tuple[Cost, ...]:
        more = (TURNS - 1) * sum(cost.flops for cost in self.cohort.costs)
        return (*self.cohort.costs, Cost("turned images", 0, 0, more, "each image in three more poses", "the start"))

    @classmethod
    def cost(cls) -> str:
        return "1 trunk, a tail after each stage, 4 times"

    @classmethod
    def plan(
        cls, anatomy: Anatomy, *, members: int | None = None, cut: str | None = None, share: str | None = None,
        peers: Sequence[nn.Module] = (), **others: Any,
    ) -> list[Branch]:  # fmt: skip
        """A branch with a classifier of the joint classes after each stage but the last, or after each of `cut`."""
        if peers or share == "none" or (members or 2) < 2:
            raise RecipeError("hsakd has branches of the network itself: leave out --peers, --share and --members 1.")
        if others.get("extra_blocks") or others.get("private_stages"):
            raise RecipeError("hsakd parts after each stage: leave out --extra-blocks, --private-stages.")
        names = cut.split(",") if cut else list(anatomy.exits())
        chosen = [name for name in names if anatomy.find_cut(name)][-(members - 1) if members else 0 :]
        if not chosen:
            raise RecipeError(f"{anatomy.name} has no stage to part after. Choose another method (okdc methods).")
        return [Branch(name, outputs=TURNS * anatomy.num_classes) for name in chosen]


def joint_labels(labels: Tensor) -> Tensor:
    """Joint classes 4 y + turn (4 B,) of labels (B,), or shares (4 B, 4 C) of shares (B, C), one turn after another."""
    if labels.dim() == 1:
        return torch.cat([TURNS * labels + turn for turn in range(TURNS)])
    turns = torch.eye(TURNS, dtype=labels.dtype, device=labels.device)
    return torch.cat([(labels[:, :, None] * turn).flatten(1) for turn in turns])
