"""Export target `tensorrt_fp16`: model.fp16.engine, built by to_tensorrt.py (beside this) from model.fp16.onnx."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

FILE = "model.fp16.engine"
DESCRIPTION = "the same in float16, from model.fp16.onnx"
ALSO = {"model.fp16.engine.json": "what model.fp16.engine is tied to"}
ASKED_BY = ("trt", "fp16")
NEEDS = ("onnx_fp16",)
PRECISION = "fp16"
TOLERANCE = 1e-2
LATENCY = {"cuda_graph": True}


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    reason = _to_tensorrt().available()
    return reason and reason.replace("model.onnx", "model.fp16.onnx")


def write(
    student: torch.nn.Module | None,
    example: torch.Tensor | None,
    path: str | Path,
    *,
    onnx_fp16: str | Path | None = None,
    profile: tuple[int, int, int] = (1, 8, 32),
    workspace: int = 4 << 30,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the engine of the ONNX file `onnx_fp16`; options and errors are those of to_tensorrt.py."""
    options = {"profile": profile, "workspace": workspace, "device": device}
    return _to_tensorrt().write(student, example, path, onnx=onnx_fp16, **options)


def runner(
    path: str | Path, device: str = "cpu", threads: int | None = None, **options: Any
) -> Callable[[np.ndarray], np.ndarray]:
    """The runner of to_tensorrt.py; images and logits stay float32."""
    return _to_tensorrt().runner(path, device, threads, **options)


def _to_tensorrt() -> ModuleType:
    return importlib.import_module(".to_tensorrt" if __package__ else "to_tensorrt", __package__)
