"""A method on several ranks: its gradients averaged, its batch norm synchronised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from okdc.ranks import world


def wrapped(module: Any, device: torch.device) -> Any:
    """`module` so that its gradients are averaged over the ranks; itself where there is one rank alone."""
    if world() == 1:
        return module
    # The graph is the same in each step, so that a parameter no step uses, which has no gradient, costs no search.
    parallel = DistributedDataParallel(module, [device.index] if device.type == "cuda" else None, static_graph=True)
    parallel.broadcast_buffers = False  # the loop averages batch norm's; the rest is the same on all ranks as it is
    return parallel


@contextmanager
def synchronised(method: nn.Module, wanted: bool) -> Iterator[None]:
    """Batch norm over the batches of all ranks; afterwards each is what it was, as the target is the user's own."""
    from timm.layers import BatchNormAct2d, SyncBatchNormAct

    norms: list[Any] = [
        module
        for module in method.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    ]
    kinds = [type(norm) for norm in norms if wanted and world() > 1]
    for norm, kind in zip(norms, kinds):  # changed in place, because hooks stand on them
        norm.process_group = None
        norm.__class__ = SyncBatchNormAct if issubclass(kind, BatchNormAct2d) else nn.SyncBatchNorm
    try:
        yield
    finally:
        for norm, kind in zip(norms, kinds):
            norm.__class__ = kind
            del norm.process_group
