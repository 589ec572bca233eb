"""Export target `onnx_int8_finetuned`: model.int8.onnx with every layer in int8, finetuned by its own float32 self.

Needs what to_onnx_int8.py needs, which must be beside this file with finetune_int8.py and onnx_in_torch.py. The
quantised graph itself is trained, so that numbers are rounded in training exactly where the file rounds them: weights,
biases and all scales, to give the logits of the float32 ONNX on training images. Labels are not needed.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

FILE = "model.int8.finetuned.onnx"
DESCRIPTION = "in 8 bits, for CPUs: every layer, finetuned on training images to give what float32 gives"
ASKED_BY = ("int8_finetune",)
NEEDS = ("onnx_int8",)  # it is shown beside what it was before
PRECISION = "int8"
MADE_FOR = "cpu"  # as to_onnx_int8.py
TOLERANCE = math.inf  # likewise
CALIBRATED = True
PREDICT = True

_STEPS = 300


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    return _beside("to_onnx_int8").available()


def write(
    student: torch.nn.Module | None,
    example: torch.Tensor | None,
    path: str | Path,
    *,
    onnx: str | Path | None = None,
    onnx_int8: str | Path | None = None,
    opset: int = 20,
    metadata: dict[str, str] | None = None,
    calibration: np.ndarray | None = None,
    finetuning: np.ndarray | None = None,
    device: str = "cpu",
    same: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> dict[str, Any]:
    """Quantise the float32 ONNX file `onnx` (else `student`, exported first), finetune that, and say what it changed.

    calibration: (N, C, H, W) float32, training images as for to_onnx_int8.py, whose second half tries the result and is
    not trained on; finetuning: further ones to train on. onnx_int8: the file before, only tried, too. device: where it
    is trained. same: as for to_onnx_int8.py. Raises RuntimeError where there are no images, for a network that torch
    cannot compute operator by operator, and when there is no less noise in the logits than before.
    """
    if calibration is None or len(calibration) < 2:
        raise RuntimeError("int8 is calibrated on training images, and there are none: give the data, --data DATA.")
    started, quantising = time.perf_counter(), _beside("int8_bench")
    to_onnx, writing = _beside("to_onnx"), _beside("onnx_writing")
    with tempfile.TemporaryDirectory() as folder:
        with writing.quiet():
            source = Path(onnx) if onnx else Path(folder) / to_onnx.FILE
            if onnx is None:
                to_onnx.write(student, example, source, opset=opset, metadata=metadata)
            bench = quantising.Bench(source, calibration, quantising.PRESETS["cpu"], Path(folder), same)
            trials = [_Trial(bench, bench.attempt(method).proto) for method in ("minmax", "percentile")]
            start = min(trials, key=lambda trial: trial.noise)
            before = start if onnx_int8 is None else _Trial(bench, _load(onnx_int8))
            images, expected = _lesson(bench, finetuning)
        proto = _beside("finetune_int8").finetune(start.proto, bench.model, images, expected, _STEPS, device)
        with writing.quiet():
            end = _Trial(bench, bench.finish(proto))
    if end.noise >= start.noise:
        raise RuntimeError(
            f"finetuning did not help, so model.int8.onnx is what there is: on {len(bench.probe)} training images that "
            f"were kept apart the noise is {100 * end.noise:.2f} % after it, and {100 * start.noise:.2f} % before"
        )
    writing.write_bytes(Path(path), end.proto.SerializeToString())
    return {
        "bytes": Path(path).stat().st_size,
        "seconds": round(time.perf_counter() - started, 1),
        "steps": _STEPS,
        "images": len(images),
        "sha256": hashlib.sha256(images.tobytes()).hexdigest(),
        "trial_images": len(bench.probe),
        "onnx_int8": before.facts,
        "before": start.facts,
        "after": end.facts,
    }


def runner(path: str | Path, device: str = "cpu", threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32 on onnxruntime, as that of to_onnx.py."""
    return _beside("to_onnx_int8").runner(path, device, threads)


def _beside(name: str) -> ModuleType:
    """The module of that name next to this file."""
    return importlib.import_module(f".{name}" if __package__ else name, __package__)


def _load(path: str | Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(path)


class _Trial:
    """A quantised model on the images that are kept apart: its noise, and the share of predictions that agree."""

    def __init__(self, bench: Any, proto: onnx.ModelProto) -> None:
        import torch

        self.proto, out = proto, bench.logits(proto, bench.probe)
        self.noise = float(_beside("finetune_int8").noise(*map(torch.from_numpy, (out, bench.expected))))
        self.agreement = 100 * float(bench.same(out, bench.expected).mean())

    @property
    def facts(self) -> dict[str, float]:
        """For verification.json, per cent."""
        return {"agreement": self.agreement, "noise": 100 * self.noise}


def _lesson(bench: Any, further: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, C, H, W) to train on, and the logits (N, classes) of float32 for them."""
    import numpy as np

    images = np.concatenate([bench.fit, *([] if further is None else [further])])
    return images, bench.logits(bench.model, images)
