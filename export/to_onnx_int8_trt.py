"""Export target `onnx_int8_trt`: model.int8.trt.onnx, quantised as TensorRT wants it: symmetric, biases in float.

Needs what to_onnx_int8.py needs, which must be beside this file. CPUs run the file too, but no faster than float32.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

FILE = "model.int8.trt.onnx"
DESCRIPTION = "in 8 bits, from which TensorRT builds an engine"
ASKED_BY = ("int8",)
PRECISION = "int8"
TOLERANCE = math.inf  # as in to_onnx_int8.py
MADE_FOR = "cuda"  # its speed elsewhere says nothing
CALIBRATED = True


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    return _to_onnx_int8().available()


def write(
    student: torch.nn.Module | None,
    example: torch.Tensor | None,
    path: str | Path,
    *,
    onnx: str | Path | None = None,
    opset: int = 20,
    metadata: dict[str, str] | None = None,
    calibration: np.ndarray | None = None,
    enough: float = 99.0,
    same: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
    """As `write` of to_onnx_int8.py, with the preset of TensorRT."""
    return _to_onnx_int8().write(
        student, example, path, onnx=onnx, opset=opset, metadata=metadata, calibration=calibration, preset="tensorrt",
        enough=enough, same=same,
    )  # fmt: skip


def runner(path: str | Path, device: str = "cpu", threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32 on onnxruntime, as that of to_onnx.py."""
    return _to_onnx_int8().runner(path, device, threads)


def _to_onnx_int8() -> ModuleType:
    """The export target next to this file."""
    return importlib.import_module(".to_onnx_int8" if __package__ else "to_onnx_int8", __package__)
