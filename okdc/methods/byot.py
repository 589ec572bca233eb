"""Gives the network small exits on the way through it. Its own end teaches them, and so its early layers.

Use it when you have little time or memory: nothing is copied, and the exits are small. It works for networks of one
stage, such as a ViT, too: these get their exits between blocks.

Paper: L. Zhang, J. Song, A. Gao, J. Chen, C. Bao, K. Ma, Be Your Own Teacher: Improve the Performance of Convolutional
    Neural Networks via Self Distillation, ICCV 2019, arXiv 1905.08094, equations 3 to 6.
Code: ArchipLab-LinfengZhang/pytorch-self-distillation-final, of the journal version, was read, and not copied: alpha
    0.3, T = 3 without T^2, exits of separable convolutions, a pair for each stage that is left, and as wide as it.
    lambda, 1e-6 for batches of 128, is from luanyunteng/pytorch-be-your-own-teacher, which is not by the authors.
Differs: The paper sums the squared differences of features; we take their sum over features and their mean over
    images, so that hint_weight is 1e-4 where lambda is 1e-6. --distance has a T^2, which is divided out. The journal
    version has attention in front of its exits, and AutoAugment and Cutout in its data; in place of the squared
    differences it has 0.03 times their root after a linear layer, for all exits but one, or nothing. None of this is
    done here.
Costs: A few convolutions and a classifier for each exit. They are thrown away, or exported as the by-product ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from okdc.anatomy.modes import unchanged
from okdc.cohort import Cohort, CohortOutput, Cost
from okdc.losses import feature_mse
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import Ensemble


class Exit(nn.Module):
    """From a map (B, D, H, W), or tokens (B, D, N, 1), to features: a pair of separable convolutions for each stage.

    widths: of the map, and of what is behind each pair, (D, ..., features). Maps are halved by the first convolution of
    a pair, widened by the second, and pooled at the end.
    """

    def __init__(self, widths: Sequence[int], tokens: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            for stride, width in ((2, inputs), (1, outputs)):
                if not tokens:
                    layers.append(nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False))
                layers += [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


class Byot(Method):
    """L = CE(z_C, y) + sum over exits of (1 - a) CE(z_i, y) + a KL(z_C || z_i) + l ||F_i - F_C||^2."""

    members = 1
    taps = ("embeddings", "exit_maps")
    tasks = ("classify", "multilabel")

    def __init__(
        self, cohort: Cohort, *, alpha: float = 0.3, temperature: float = 3.0, hint_weight: float = 1e-4
    ) -> None:
        super().__init__(cohort)
        self.alpha = alpha
        self.temperature = temperature
        self.hint_weight = hint_weight
        shapes, width = cohort.exit_shapes, cohort.embedding_widths[0]
        widths = [*(depth for depth, _, _ in shapes), width]
        self.exits = nn.ModuleList(
            Exit(widths[i:], height > 1 and wide == 1) for i, (_, height, wide) in enumerate(shapes)
        )
        self.classifiers = nn.ModuleList(nn.Linear(width, cohort.anatomy.num_classes) for _ in shapes)

    @property
    def learners(self) -> tuple[str, ...]:
        return ("target", *(f"exit{i}" for i in range(1, 1 + len(self.exits))))

    def said(self, out: CohortOutput) -> tuple[Tensor, ...]:
        return (out.logits[0], *self.classified(self.features(out)))

    def features(self, out: CohortOutput) -> list[Tensor]:
        """The features (B, D) at each exit, as wide as the network's own embedding."""
        return [leave(x) for leave, x in zip(self.exits, out.exit_maps, strict=True)]

    def classified(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits (B, C) of each exit."""
        return [classify(x) for classify, x in zip(self.classifiers, features, strict=True)]

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        features = self.features(out)
        return self.self_losses(out.logits[0], out.embeddings[0], self.classified(features), features, labels)

    def self_losses(
        self, deepest: Tensor, embedding: Tensor, exits: Sequence[Tensor], features: Sequence[Tensor], labels: Tensor
    ) -> dict[str, Tensor]:
        """Logits (B, C) and embedding (B, D) of the network's end, and those of each exit."""
        parts = {"ce/target": self.task.supervised(deepest, labels)}
        for name, z, x in zip(self.learners[1:], exits, features, strict=True):
            apart = self.task.distance(z, deepest, labels, self.temperature) / self.temperature**2
            parts[f"ce/{name}"] = (1 - self.alpha) * self.task.supervised(z, labels)
            parts[f"kd/{name}"] = self.alpha * apart
            parts[f"hint/{name}"] = self.hint_weight * x.shape[1] * feature_mse(x, embedding)
        return parts

    def byproducts(self) -> dict[str, nn.Module]:
        """The network with its exits, whose mean is the paper's ensemble."""
        return {"ensemble": Ensemble(self)}

    def costs(self) -> tuple[Cost, ...]:
        rows, first = [], next(self.parameters())
        exits = zip(self.learners[1:], self.exits, self.classifiers, self.cohort.exit_shapes, strict=True)
        for (name, leave, classify, shape), place in zip(exits, self.cohort.anatomy.exits(), strict=True):
            head = nn.Sequential(leave, classify)
            with unchanged(head), torch.no_grad(), FlopCounterMode(display=False) as counter:
                head.eval()(torch.zeros(1, *shape, device=first.device, dtype=first.dtype))
            params = sum(p.numel() for p in head.parameters())
            rows.append(Cost(name, params, params, counter.get_total_flops(), "an exit", place))
        return (*self.cohort.costs, *rows)

    @classmethod
    def cost(cls) -> str:
        return "1 network, small exits"
