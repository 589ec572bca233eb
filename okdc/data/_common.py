"""What the parts of `okdc.data` share: the values they return, borrowed random numbers, and the count of bad images."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from okdc.errors import DataError

log = logging.getLogger("okdc")

BadImage = tuple[str, str]  # name, reason
Batch = tuple[Tensor, Tensor]
TrainBatch = tuple[Tensor, ...]  # images (B, C, H, W) or (V, B, C, H, W), labels (B,) or (B, classes), perhaps indices


class TrainBatches(Protocol):
    """Training batches of (images, labels); `len` is the number of steps per epoch."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[TrainBatch]:
        """The batches of `epoch` (0-based) from step `start` on: images (B, C, H, W), labels (B,) or (B, classes).

        With views the images are (V, B, C, H, W); with indices a third tensor (B,) int64 says which image each one is.
        """
        ...

    def __len__(self) -> int: ...


class RawTraining(Protocol):
    """(PIL image as stored, class index) by position; raises whatever reading the image raises."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Source:
    """A data set opened and checked, not yet batched; each split gives (PIL image, class index)."""

    train: Any
    validation: Any
    classes: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class Data:
    """Batches to train and to validate with.

    `validation` gives (images (B, C, H, W) float32, labels (B,) int64), every readable image once and in order;
    `validation_images` gives the same images raw, as (PIL image, class index), or is None where only the user's own
    loader knows them. `preprocess` has the keys of timm's pretrained_cfg. `sizes` counts the training and the
    validation images. `bad_images` maps each image that could not be read so far to the reason. `train_labels` (N,) are
    the classes of the training images, in the order of their indices, `held_out` gives the images that were set aside,
    as `validation` does, and `training_images` are those that are trained on, raw, by position; each is None where it
    is not known.
    """

    train: TrainBatches
    validation: Iterable[Batch] | None
    validation_images: Iterable[tuple[Image.Image, int]] | None
    classes: tuple[str, ...]
    preprocess: dict[str, Any]
    name: str
    sizes: tuple[int, int]
    bad_images: dict[str, str]
    train_labels: Tensor | None = None
    held_out: Iterable[Batch] | None = None
    training_images: RawTraining | None = None


class BadImages:
    """Unreadable images: each is named once in the log; more than `limit` of them stop the run with a DataError."""

    def __init__(self, limit: int):
        self.limit = limit
        self.reasons: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        if name in self.reasons:
            return
        self.reasons[name] = reason
        log.warning("skipped an unreadable image: %s (%s)", name, reason)
        if len(self.reasons) > self.limit:
            some = "; ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:5])
            raise DataError(
                f"{len(self.reasons)} images cannot be read, and at most {self.limit} may be skipped. Some of them: "
                f"{some}. Mend or delete them, or allow more with --max-bad-images N."
            )


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


def leave_signals(worker: int) -> None:
    """For a data worker: a terminal's Ctrl-C and SIGHUP and a scheduler's SIGTERM, which all get, do not end it.

    The main process needs data to finish its step; it ends its workers itself, also by SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        main = multiprocessing.parent_process()  # not os.getppid(), which a fork server may be
        assert main is not None
        threading.Thread(target=_end_when_told, args=(main.pid,), daemon=True).start()


def _end_when_told(by: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != by:
        pass
    os._exit(0)


def as_loaded(batch: Any) -> Any:
    """The collate_fn of data sets that load whole batches; a function of the module's, as workers may be sent it."""
    return batch
