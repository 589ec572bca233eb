"""The device that a run trains on, and how precisely it computes there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from okdc.errors import RecipeError
from okdc.ranks import local_rank, world
from okdc.recipe import TrainSettings


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
        raise RecipeError(
            f"--device {device}: torch finds {count} CUDA devices here. Try --device auto{fewer}; "
            "okdc doctor says what is missing."
        )
    return device


@contextlib.contextmanager
def fast_arithmetic(settings: TrainSettings) -> Iterator[None]:
    """What the settings allow for speed holds for as long as a run trains; files are verified without it."""
    benchmark, precision = torch.backends.cudnn.benchmark, None
    if settings.matmul_precision:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(settings.matmul_precision)
    torch.backends.cudnn.benchmark = benchmark or settings.cudnn_benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if precision:
            torch.set_float32_matmul_precision(precision)


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
    if name is None and device.type == "cuda":
        with torch.cuda.device(device):  # of which alone it can be asked
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if name is None:
        return torch.bfloat16
    if name not in ("bfloat16", "float16"):
        raise RecipeError(f"--amp-dtype {name}: expected bfloat16 or float16.")
    return getattr(torch, name)
