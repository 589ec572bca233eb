"""What the processes that train one method together say to one another; in a process alone each of these is nothing.

Every rank (process) has an equal part of each batch. What a method takes from here makes its losses those of the whole
batch: `gather`, `mean_` and `drawn_together` are all that a method needs to know of other ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> int:
    """How many processes train together; 1 alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; the first alone writes, logs and exports."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_rank() -> int:
    """Which of the processes of this node it is, so which of its devices it has."""
    if world() == 1:
        return 0
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    # SLURM may show each of its tasks one device alone; of torch's mp.spawn no more is known than the rank.
    return int(os.environ.get("SLURM_LOCALID") or rank()) % max(1, torch.cuda.device_count())


def local_world() -> int:
    """How many of the processes are on this node; where nobody says it, all of them."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE", "")
    return min(world(), int(told)) if told.isdigit() else world()


def gather(tensor: Tensor, dim: int = 0) -> Tensor:
    """What all ranks have of this, one after another along `dim`; the shape is the same on each.

    Gradients flow back to the ranks they belong to, also those of gradients: a loss of the whole batch, computed by
    every rank, has the gradient that one process would have found, when that is averaged over the ranks.
    """
    return tensor if world() == 1 else _gathered(tensor, dim)


def mean_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over the ranks, in place and in one call."""
    if world() > 1 and tensors:
        _average(tensors)


def drawn_together(draw: Callable[[Tensor], Tensor], indices: Tensor) -> Tensor:
    """`draw(indices)`, random, where the draw is one of all ranks' indices, of which each keeps its own rows."""
    return draw(indices) if world() == 1 else _draw(draw, indices)


def share(batches: Iterable[T]) -> Iterable[T]:
    """This rank's part of validation batches: every one is some rank's, and no image is padding."""
    if world() == 1:
        return batches
    every = getattr(batches, "every", None)  # of a source that need not read what it skips
    return every(rank(), world()) if every else islice(batches, rank(), None, world())


def first(work: Callable[[], T]) -> T:
    """What `work` gives on the first rank, for all; its error is raised on all, too."""
    if world() == 1:
        return work()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(world())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Scatter.apply(gradient)


class _Scatter(torch.autograd.Function):
    """This rank's part of the sum over the ranks, whose gradient is gathered again."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = tensor.contiguous().chunk(world())
        own = torch.empty_like(parts[0])
        # As a list, because the form with one tensor is deprecated since torch 2.14. gloo makes all-reduces of both.
        dist.reduce_scatter(own, list(parts))
        return own

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _Gather.apply(gradient.contiguous())


# Messages are not to be traced: a compiled step has a break at each of them.
@torch.compiler.disable
def _gathered(tensor: Tensor, dim: int) -> Tensor:
    return _Gather.apply(tensor.movedim(dim, 0).contiguous()).movedim(0, dim)


@torch.compiler.disable
@torch.no_grad()
def _average(tensors: Sequence[Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


_drawn: tuple[int, Tensor] | None = None  # the step's seed, and where its common random numbers stand


@torch.compiler.disable
def _draw(draw: Callable[[Tensor], Tensor], indices: Tensor) -> Tensor:
    global _drawn
    device = indices.device
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    seed, own = (generator.initial_seed() - rank()) % 2**64, generator.get_state()  # as `seed_everything` moved it
    generator.manual_seed(seed)
    if _drawn is not None and _drawn[0] == seed:
        generator.set_state(_drawn[1])
    try:
        drawn = draw(gather(indices))
        _drawn = seed, generator.get_state()
        return drawn.chunk(world())[rank()]
    finally:
        generator.set_state(own)
