"""Trains several copies of the network by themselves. Every few steps each is pulled a little to their mean.

Use it when you can afford several networks, and want one that is as good as their average. No network looks at what
another says. So it works for every network and every loss.

Paper: A. Jolicoeur-Martineau, E. Gervais, K. Fatras, Y. Zhang, S. Lacoste-Julien, PopulAtion Parameter Averaging
    (PAPA), Transactions on Machine Learning Research, 2024, arXiv 2304.03094: the gradual variant.
Code: None was at hand; the paper's formula was written out.
Differs: The paper's networks differ in order of images, augmentation and regularisation; okdc's get a view of each
    image for each of them (views=False: the same one). Batch-norm statistics stay each network's own. Your network
    ships, which the pull has brought near the mean; the paper ships the mean of all, or a greedy choice. The pull is
    the same to the end, whatever the learning rate.
Costs: Each member is one whole network, in training only. The pull costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from okdc.cohort import Cohort, CohortOutput
from okdc.errors import RecipeError
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import Ensemble
from okdc.needs import Needs


class Papa(Method):
    """L = sum_i CE(z_i, y); every `every` steps each theta_i becomes decay theta_i + (1 - decay) mean_j theta_j."""

    members = 3
    share = "none"
    compares = False
    tasks = ("classify", "multilabel")

    def __init__(self, cohort: Cohort, *, decay: float = 0.99, every: int = 10, views: bool = True) -> None:
        super().__init__(cohort)
        if not 0 <= decay <= 1 or every < 1:
            raise RecipeError(f"papa has decay {decay} and every {every}: expected 0 to 1, and 1 step or more.")
        self.decay = decay
        self.every = every
        self.views = views
        self.steps = 0
        shapes = [[(name, p.shape) for name, p in member.named_parameters()] for member in cohort.members]
        if len(cohort) < 2 or any(of_one != shapes[0] for of_one in shapes):
            raise RecipeError(
                "papa takes the mean of its networks' weights, so they are several of one architecture: leave out "
                "--peers, --share trunk and --extra-blocks."
            )

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        return Needs(views=settings.get("views", True))

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        names = self.cohort.names
        return {f"ce/{name}": self.task.supervised(z, labels) for name, z in zip(names, out.logits, strict=True)}

    @torch.no_grad()
    def after_step(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Pull the networks to their mean, every so many steps."""
        self.steps += 1
        if self.steps % self.every == 0:
            members = self.cohort.members
            pull([[p for p in member.parameters() if p.requires_grad] for member in members], 1 - self.decay)

    def byproducts(self) -> dict[str, nn.Module]:
        """All networks together."""
        return {"ensemble": Ensemble(self)}

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


def pull(networks: Sequence[Sequence[Tensor]], share: float) -> None:
    """Move each network's parameters that share of the way to the mean of all, in place."""
    for tensors in zip(*networks, strict=True):
        mean = torch.stack([tensor.detach() for tensor in tensors]).mean(0)
        for tensor in tensors:
            tensor.lerp_(mean, share)
