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
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def random_state() -> tuple[Any, ...]:
    """Where torch's (and the GPU's) and Python's random numbers stand."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, random.getstate()


def set_random_state(state: tuple[Any, ...]) -> None:
    cpu, cuda, python = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
    random.setstate(python)


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
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        reseed(*key)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def iterate_seeded(batches: Iterable[Any], *key: int) -> Iterator[Any]:
    """Iterate with random numbers that depend only on `key` and the step, and that nobody else notices."""
    with borrowed_generators(*key):
        iterator = iter(batches)
    for step in count(1):
        with borrowed_generators(*key, step):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch
