"""Runtime `openvino`: ONNX files in Intel's OpenVINO, on the CPU, in each number type that it computes in fast.

Needs numpy and openvino.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

NAME = "OpenVINO"

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    return None if importlib.util.find_spec("openvino") else "OpenVINO is not installed: pip install openvino"


@cache
def _core() -> Any:
    """The one Core of this process, kept for ever.

    Each one gives the main thread another stack for its signal handlers, and back the one it found when it ends: of
    two that do not end in turn, the last one leaves a stack that is freed, and the next signal ends the process.
    """
    import openvino

    return openvino.Core()


def precisions() -> tuple[str, ...]:
    """The number types that this CPU computes in: fp32, and the one that OpenVINO takes where it is not told."""
    able = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    # Any CPU takes any hint, and what it lacks it computes slowly in another way.
    return ("fp32", *[name for name in ("bf16", "fp16") if name.upper() in able][:1])


def runner(
    path: str | Path, device: str = "cpu", threads: int | None = None, precision: str = "fp32"
) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32; `.provider` names the version and the number type.

    The model is compiled for one batch size at a time, as a service would: a free one costs a tenth of the speed.
    Raises RuntimeError where OpenVINO does not compute in `precision`, which layers in int8 are no part of.
    """
    if device != "cpu":
        raise RuntimeError(f"OpenVINO runs on the CPU here, not on {device!r}: give cpu.")
    return _Compiled(Path(path), threads, precision)


class _Compiled:
    """A model with a request to run it at the batch size that it was last asked for."""

    def __init__(self, path: Path, threads: int | None, precision: str) -> None:
        import openvino

        self._hint = _HINTS[precision]
        self._model = _core().read_model(path)
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        self._settings = settings | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
        self._shape: tuple[int, ...] | None = None
        self._request: Any = None
        self.provider = f"OpenVINO {openvino.__version__.partition('-')[0]}, {precision}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        import numpy as np

        if images.shape != self._shape:
            self._compile(images.shape)
        return np.array(next(iter(self._request.infer([images], share_inputs=True).values())))

    def _compile(self, shape: tuple[int, ...]) -> None:
        self._model.reshape(list(shape))
        compiled = _core().compile_model(self._model, "CPU", self._settings | {"INFERENCE_PRECISION_HINT": self._hint})
        used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if used != self._hint:
            raise RuntimeError(f"OpenVINO was asked to compute in {self._hint} and computes in {used}.")
        self._shape, self._request = shape, compiled.create_infer_request()
