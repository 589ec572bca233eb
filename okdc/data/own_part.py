"""A rank's part of the batches of a user's own loader: dealt out one by one, before they are read where that can be.

It can be where torch's DataLoader takes the images of a data set in turn or shuffled, by its own samplers: the same
batches then come to the same ranks as if each read all. Without worker processes they have the random numbers that one
process would have given them too; with W ranks of n workers, those of one process with W * n (but for numpy's).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    get_worker_info,
)

from okdc.data.values import Batch, log
from okdc.system.randomness import borrowed_generators, derive_seed, iterate_seeded

T = TypeVar("T")

KEPT = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "multiprocessing_context", "generator", "prefetch_factor",
    "persistent_workers", "pin_memory_device", "in_order",
)  # fmt: skip


def samplers(loader: Any) -> list[Any]:
    """What decides on the order of a loader, with None where there is nothing."""
    batches = getattr(loader, "batch_sampler", None)
    return [getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]


def is_divided(loader: Any) -> bool:
    """Whether it gives one process's part: torch's DistributedSampler and timm's alike know of how many."""
    return any(getattr(sampler, "num_replicas", 1) > 1 for sampler in samplers(loader))


def _without_single(batches: Iterator[T], size: Callable[[T], int]) -> Iterator[T]:
    """The batches, without those of one image where the first has more."""
    least = 1
    for i, batch in enumerate(batches):
        least = min(2, size(batch)) if i == 0 else least
        if size(batch) >= least:
            yield batch


def dealt(batches: Iterator[T], rank: int, world: int, size: Callable[[Any], int] = len) -> Iterator[T]:
    """The `rank`-th of each `world` batches to train on, without single images and groups that are not of one size."""
    whole = _without_single(batches, size)
    while len(group := list(islice(whole, world))) == world:
        if len({size(batch) for batch in group}) == 1:
            yield group[rank]


def every(batches: Iterator[T], rank: int, world: int) -> Iterator[T]:
    """The `rank`-th of each `world` batches to validate with, all of which are some rank's."""
    return islice(batches, rank, None, world)


def is_divisible(loader: Any) -> bool:
    """Whether the order of its batches can be taken over, and with that nothing else changed."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return False
    batches = loader.batch_sampler
    return type(batches) is BatchSampler and type(batches.sampler) in (RandomSampler, SequentialSampler)


def tell_undivided(loader: Any, role: str, world: int) -> None:
    """Warn of a loader that each of several ranks has to read whole."""
    if world > 1 and not (isinstance(loader, (list, tuple)) or is_divided(loader) or is_divisible(loader)):
        log.warning(
            "each of %d processes reads the whole %s loader, and keeps its part: okdc divides the images of a plain "
            "torch DataLoader alone (over a data set with a length, by shuffle or in order).", world, role,
        )  # fmt: skip


class PartLoader:
    """A DataLoader like one that `is_divisible`, of those of its batches that `deal` gives this rank."""

    def __init__(self, loader: Any, deal: Callable[[Iterator[Any]], Iterator[Any]], rank: int, world: int):
        kept = {name: getattr(loader, name) for name in KEPT}
        self.rank, self.world = rank, world
        self.order = _Order(loader.batch_sampler, deal, drawn_alone=rank > 0 and not loader.num_workers)
        begin = partial(_begin, rank, world, loader.worker_init_fn)
        self.loader: DataLoader = DataLoader(loader.dataset, batch_sampler=self.order, worker_init_fn=begin, **kept)

    def read(self, *key: int) -> Iterator[Batch]:
        """The batches, with random numbers that depend on `key` and on the batch's number in the whole loader."""
        self.order.key = key
        return iterate_seeded(self.loader, *key, first=1 + self.rank, every=self.world)


class _Order(Sampler):
    def __init__(self, batches: Any, deal: Callable[[Iterator[Any]], Iterator[Any]], drawn_alone: bool):
        self.batches, self.deal, self.drawn_alone = batches, deal, drawn_alone
        self.key: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[list[int]]:
        dealt_out = self.deal(iter(self.batches))
        # A sampler draws its order with the first batch: that of the whole loader, which the first rank reads.
        with borrowed_generators(*self.key, 1) if self.drawn_alone else nullcontext():
            first = next(dealt_out, None)
        if first is not None:
            yield first
            yield from dealt_out


def _begin(rank: int, world: int, begin: Callable[[int], Any] | None, worker: int) -> None:
    """In a data worker: seed it as that of one process with the workers of all ranks, whose batches it reads."""
    info: Any = get_worker_info()
    seed = info.seed + worker * (world - 1) + rank
    object.__setattr__(info, "seed", seed)  # its class may be frozen
    random.seed(seed)
    torch.manual_seed(seed)
    np.random.seed(derive_seed(seed, seed >> 32))
    if begin is not None:
        begin(worker)
