"""What training needs of the machine it runs on: device and precision, random numbers, signals."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from okdc.errors import RecipeError
from okdc.ranks import local_rank, mean_, world
from okdc.settings import TrainSettings

SIGNALS = tuple(each for each in signal.Signals if each.name in ("SIGINT", "SIGTERM", "SIGHUP"))  # Windows has no HUP


def choose_device(name: str) -> torch.device:
    """The device called `name`, auto being CUDA where there is one, else the CPU; RecipeError when it is not there.

    Of several processes each has the device of its own number.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: expected auto, cpu, cuda or cuda:1.") from error
    if device.type == "cuda" and world() > 1:
        device = torch.device("cuda", local_rank())
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        fewer = f" or --devices {count}" if world() > 1 else ""
        raise RecipeError(f"--device {device}: torch finds {count} CUDA devices here. Try --device auto{fewer}.")
    return device


@dataclass(frozen=True)
class Machine:
    """Where the arithmetic is done and how precisely."""

    device: torch.device
    dtype: torch.dtype | None  # of mixed precision; None is full precision
    memory_format: torch.memory_format

    @classmethod
    def of(cls, settings: TrainSettings) -> Machine:
        """The machine that the settings ask for, their defaults being those of its device."""
        device = choose_device(settings.device)
        on_cuda = device.type == "cuda"
        dtype = _precision(settings.amp_dtype, device) if (on_cuda if settings.amp is None else settings.amp) else None
        faster = on_cuda or dtype == torch.bfloat16  # on a CPU 2.2 times float32, and without it 1.9 times
        channels_last = faster if settings.channels_last is None else settings.channels_last
        return cls(device, dtype, torch.channels_last if channels_last else torch.preserve_format)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context in which forward passes are made."""
        return torch.autocast(self.device.type, dtype=self.dtype) if self.dtype else contextlib.nullcontext()

    def move(self, images: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """A batch on the device: images (B, C, H, W) or views (V, B, C, H, W), and what belongs to them."""
        flat = images.flatten(0, -4).to(self.device, non_blocking=True, memory_format=self.memory_format)
        images = flat.unflatten(0, images.shape[:-3]) if images.dim() > 4 else flat
        return images, *(tensor.to(self.device, non_blocking=True) for tensor in rest)


def _precision(name: str | None, device: torch.device) -> torch.dtype:
    if name is None:
        no_bf16 = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float16 if no_bf16 else torch.bfloat16
    if name not in ("bfloat16", "float16"):
        raise RecipeError(f"--amp-dtype {name}: expected bfloat16 or float16.")
    return getattr(torch, name)


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


def heeded() -> list[signal.Signals]:
    """Those of SIGNALS upon which a run saves: not a hang-up that nohup has it ignore."""
    return [each for each in SIGNALS if each == signal.SIGINT or signal.getsignal(each) is not signal.SIG_IGN]


class StopSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a wish, `signal`, that the loop sees after its step; the second
    one ends the process at once. In any thread but the main one it does nothing."""

    def __init__(self) -> None:
        self.signal = 0
        self.agreed = 0  # by all ranks, in several processes
        self.process = os.getpid()
        self.before: dict[int, Any] = {}

    @property
    def wish(self) -> int:
        """The signal to leave for; of several processes the one that any of them got, when all know of it."""
        return self.signal if world() == 1 else self.agreed

    @property
    def exit_code(self) -> int:
        return 128 + self.wish

    def agree(self, values: Tensor, others: Sequence[Tensor] = ()) -> list[float]:
        """`values` (N,), averaged over the ranks together with `others` (these in place), and what to leave for."""
        asked = values.new_tensor([self.signal == number for number in SIGNALS])
        told = torch.cat([values, asked])
        mean_([told, *others])
        got = told.tolist()
        self.agreed = next((number for number, share in zip(SIGNALS, got[len(values) :]) if share), 0)
        return got[: len(values)]

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._handle) for number in heeded()}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a data worker forked from here: Ctrl-C is its parent's to answer
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.signal:
            raise SystemExit(128 + number)
        self.signal = number
        os.write(2, b"\nStopping after this step; once more stops at once.\n")  # print may not be called in a handler
