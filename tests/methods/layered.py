"""L-MCL on small networks and eight images."""

from __future__ import annotations

import torch
from torch import nn

import okdc.networks  # noqa: F401 (registers the CIFAR networks)
from okdc.anatomy import inspect
from okdc.cohort import Cohort
from okdc.methods.lmcl import Lmcl
from tests.helpers.networks import Tiny

IMAGES, LABELS = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
TRAIN_LABELS = torch.arange(40) % 4


def method(target: nn.Module | None = None, peers: tuple[nn.Module, ...] = (), **settings: object) -> Lmcl:
    target = target or Tiny()
    plan = Lmcl.plan(inspect(target, IMAGES), peers=peers)
    return Lmcl(Cohort(target, IMAGES, plan), train_labels=TRAIN_LABELS, **settings)  # type: ignore[arg-type]
