"""Two images, and a cohort whose members all have the weights of the target."""

from __future__ import annotations

import torch

from okdc.cohort import Cohort


def example(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def with_weights_of_target(cohort: Cohort) -> Cohort:
    """The same cohort with every branch's weights set equal to the target's."""
    own = cohort.target.state_dict()
    for branch in cohort.branches:
        branch.load_state_dict({k: v for k, v in own.items() if k in branch.state_dict()})
    return cohort
