"""Random numbers: seeded by what they are for, kept and given back, so that nobody disturbs anybody else's."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(*position: int, rank: int = 0) -> None:
    """Make all random numbers that follow a function of `position`, such as (seed, epoch, step), and of the rank."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    seed = (int.from_bytes(digest, "little") + rank) % 2**64
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # torch.manual_seed would walk the call stack to note this down for later: 150 us
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """Give the caller's random states back at the end."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def random_state(gpus: bool = True) -> tuple[Any, ...]:
    """Where the random numbers of Python, numpy, torch and all its GPUs stand: whichever of them a network is on."""
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
    cuda = torch.cuda.get_rng_state_all() if gpus and torch.cuda.is_initialized() else ()
    return random.getstate(), (kind, keys.tobytes(), *rest), torch.get_rng_state(), *cuda


def set_random_state(state: tuple[Any, ...]) -> None:
    """Put all that `random_state` looked at back to where it stood."""
    python, (kind, keys, *rest), cpu, *cuda = state
    random.setstate(python)
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda)


def derive_seed(*key: int) -> int:
    """A 32-bit seed that depends on `key` and on nothing else; zeros at the end of a key do not count."""
    return int(np.random.SeedSequence([part & 0xFFFFFFFF for part in key]).generate_state(1)[0])


def reseed(*key: int) -> None:
    """Seed the global generators of Python, numpy and torch (CPU only: a GPU's belong to the network)."""
    seed = derive_seed(*key)
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


@contextmanager
def borrowed_generators(*key: int) -> Iterator[None]:
    """Seed the global generators from `key` for a while, then give them back as they were."""
    state = random_state(gpus=False)  # theirs belong to the network
    try:
        reseed(*key)
        yield
    finally:
        set_random_state(state)


def iterate_seeded(batches: Iterable[Any], *key: int, first: int = 1, every: int = 1) -> Iterator[Any]:
    """Iterate with random numbers that depend only on `key` and the step, and that nobody else notices.

    Of several processes each has its own steps: the `first`, and each `every`-th from there on.
    """
    with borrowed_generators(*key):
        iterator = iter(batches)
    for step in count(first, every):
        with borrowed_generators(*key, step):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def uniform(keys: Tensor, count: int) -> Tensor:
    """Random numbers (B, count) in [0, 1), float64, from keys (B,) int64: splitmix64 (Steele et al. 2014)."""
    steps = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    return _shift(mix(keys[:, None] + steps), 11).double() * 2.0**-53


def mix(x: Tensor) -> Tensor:
    """A random-looking number for each int64, always the same for the same one."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


_GOLDEN = -0x61C8864680B583EB


def _shift(x: Tensor, by: int) -> Tensor:
    """To the right, with zeros coming in from the left; torch's int64 would bring in the sign."""
    return (x >> by) & (2 ** (64 - by) - 1)
