"""Export target `onnx_int8`: model.int8.onnx for CPUs, quantised by onnxruntime (QDQ) on training images.

Needs torch, numpy, onnx, onnxscript and onnxruntime, and to_onnx.py and int8_bench.py beside this file. Layers whose
quantisation does the damage are found by measurement and stay in float. The graph for TensorRT is another one:
to_onnx_int8_trt.py.
"""

from __future__ import annotations

import importlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

    from export.int8_bench import Bench, Try

FILE = "model.int8.onnx"
DESCRIPTION = "in 8 bits, for CPUs"
ASKED_BY = ("int8",)
PRECISION = "int8"
MADE_FOR = "cpu"  # no other provider of onnxruntime has kernels for it
TOLERANCE = math.inf  # of single logits says nothing here: agreement and accuracy judge int8
CALIBRATED = True
PREDICT = True

_MOST_FLOAT = 0.5  # share of the layers that may stay in float; beyond that, little is left to gain


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    return _beside("to_onnx").available()


def write(
    student: torch.nn.Module | None,
    example: torch.Tensor | None,
    path: str | Path,
    *,
    onnx: str | Path | None = None,
    opset: int = 20,
    metadata: dict[str, str] | None = None,
    calibration: np.ndarray | None = None,
    preset: str = "cpu",
    enough: float = 99.0,
    same: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Quantise the float32 ONNX file `onnx` (else `student`, exported first), and say how and what was left in float.

    calibration: (N, C, H, W) float32, training images as the network takes them; one half sets the ranges, the other
    tries what comes of it. Steps, each only while less than `enough` per cent of the predictions agree: ranges by
    minimum and maximum; by percentile; then the layers that do most damage by themselves stay in float, half of them at
    most. Of a network of heat maps the last convolution always does: where a peak is says less than 8 bits tell between
    two pixels. `enough` is more than a gate asks for, as a network is surest on training images. `same` says on which
    images (B,), or points of them, two outputs predict the same; without it, where the largest logit is the same one.
    `preset`: "cpu" or "tensorrt". Raises RuntimeError when there are no images to calibrate on, or onnxruntime cannot
    quantise the graph.
    """
    if calibration is None or len(calibration) < 2:
        raise RuntimeError("int8 is calibrated on training images, and there are none: give the data, --data DATA.")
    started, to_onnx, writing = time.perf_counter(), _beside("to_onnx"), _beside("onnx_writing")
    quantising = _beside("int8_bench")
    with tempfile.TemporaryDirectory() as folder, writing.quiet():
        source = Path(onnx) if onnx else Path(folder) / to_onnx.FILE
        if onnx is None:
            to_onnx.write(student, example, source, opset=opset, metadata=metadata)
        bench = quantising.Bench(source, calibration, quantising.PRESETS[preset], Path(folder), same)
        proto, facts = _search(bench, enough)
    writing.write_bytes(Path(path), proto.SerializeToString())
    seconds = round(time.perf_counter() - started, 1)
    return {"preset": preset, "bytes": Path(path).stat().st_size, "seconds": seconds, **facts}


def runner(path: str | Path, device: str = "cpu", threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32 on onnxruntime, as that of to_onnx.py."""
    return _beside("to_onnx").runner(path, device, threads)


def _beside(name: str) -> ModuleType:
    """The module of that name next to this file."""
    return importlib.import_module(f".{name}" if __package__ else name, __package__)


# ---- the search


def _search(bench: Bench, enough: float) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The first model that agrees with float32 often enough, else the best one; and how it was found."""
    steps: list[dict[str, Any]] = []

    def attempt(method: str, kept: Sequence[str]) -> Try:
        whole = [*bench.ends, *kept]
        tried = bench.attempt(method, whole)
        step = {"method": method, "kept_in_float": len(whole), "agreement": tried.agreement, "sqnr_db": tried.sqnr_db}
        steps.append(step)
        return tried

    kept: list[str] = []
    method, damage = "minmax", dict[str, float]()
    best = attempt(method, kept)
    if best.agreement < enough:
        other = attempt("percentile", kept)
        if _rank(other) > _rank(best):
            method, best = "percentile", other
    if best.agreement < enough:
        damage = bench.damage(method)
        worst = sorted((unit for unit in damage if unit not in bench.ends), key=lambda unit: -damage[unit])
        best, kept = _exclude(lambda kept: attempt(method, kept), worst, best, enough)
    return best.proto, {
        "method": method,
        "per_channel": True,
        "reduce_range": bench.reduce_range,
        "calibration_images": len(bench.fit),
        "trial_images": len(bench.probe),
        "agreement": best.agreement,
        "sqnr_db": best.sqnr_db,
        "layers": len(bench.layers),
        "kept_in_float": [{"layer": unit, "damage": damage.get(unit)} for unit in (*bench.ends, *kept)],
        "steps": steps,
    }


def _exclude(
    attempt: Callable[[Sequence[str]], Try], worst: list[str], best: Try, enough: float
) -> tuple[Try, list[str]]:
    """Leave ever more of the worst units in float until enough predictions agree, then as few as will do."""
    tries, low, count = {0: best}, 0, 1
    limit = max(1, int(_MOST_FLOAT * len(worst)))
    while tries[low].agreement < enough and low < limit:
        count = min(count, limit)
        tries[count] = attempt(worst[:count])
        if tries[count].agreement >= enough:
            break
        low, count = count, 2 * count
    high = max(tries)
    while tries[high].agreement >= enough and high - low > 1:
        middle = (low + high) // 2
        tries[middle] = attempt(worst[:middle])
        low, high = (low, middle) if tries[middle].agreement >= enough else (middle, high)
    good = [count for count in tries if tries[count].agreement >= enough]
    chosen = min(good) if good else max(tries, key=lambda count: _rank(tries[count]))
    return tries[chosen], worst[:chosen]


def _rank(tried: Try) -> tuple[float, float]:
    return tried.agreement, tried.sqnr_db
