"""An order in which every class is drawn equally often, whatever the number of its images."""

from __future__ import annotations

import torch
from torch import Tensor

from okdc.system.randomness import derive_seed


def balanced_order(labels: Tensor, seed: int, epoch: int, generator: torch.Generator) -> Tensor:
    """Positions (N,): of labels (N,) with C classes, N / C images of each, rounded up and cut to N at random.

    The images of a class stand in a circle, in an order that is the seed's. An epoch takes the next ones after those of
    the epoch before: none comes twice in an epoch before all of its class did, and over the epochs all have their turn.
    """
    of_run = torch.Generator().manual_seed(derive_seed(seed, 0, 1))
    shuffled = torch.randperm(len(labels), generator=of_run)
    circles = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    starts = (counts.cumsum(0) - counts)[counts > 0, None]
    counts = counts[counts > 0, None]
    share = -(-len(labels) // len(counts))
    turns = epoch * share + torch.arange(share)
    drawn = circles[starts + turns % counts].flatten()
    return drawn[torch.randperm(len(drawn), generator=generator)][: len(labels)]
