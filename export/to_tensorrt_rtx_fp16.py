"""Export target `tensorrt_rtx_fp16`: model.fp16.rtx.engine, built by to_tensorrt_rtx.py from model.fp16.onnx."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

FILE = "model.fp16.rtx.engine"
DESCRIPTION = "the same in float16, from model.fp16.onnx"
ALSO = {"model.fp16.rtx.engine.json": "what model.fp16.rtx.engine is for, and built from"}
ASKED_BY = ("trt_rtx", "fp16")
NEEDS = ("onnx_fp16",)
ROW = "TensorRT for RTX, fp16"
PRECISION = "fp16"
TOLERANCE = 1e-2
RUNS_ON = "cuda"


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    return _to_tensorrt_rtx().available()


def write(
    student: torch.nn.Module | None,
    example: torch.Tensor | None,
    path: str | Path,
    *,
    onnx_fp16: str | Path | None = None,
    profile: tuple[int, int, int] = (1, 8, 32),
    workspace: int = 4 << 30,
) -> dict[str, Any]:
    """Write the engine of the ONNX file `onnx_fp16`; options and errors are those of to_tensorrt_rtx.py."""
    return _to_tensorrt_rtx().write(student, example, path, onnx=onnx_fp16, profile=profile, workspace=workspace)


def runner(path: str | Path, device: str = "cpu", threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """The runner of to_tensorrt_rtx.py; images and logits stay float32."""
    return _to_tensorrt_rtx().runner(path, device, threads)


def _to_tensorrt_rtx() -> ModuleType:
    return importlib.import_module(".to_tensorrt_rtx" if __package__ else "to_tensorrt_rtx", __package__)
