"""Runtime `onnxruntime_rtx`: ONNX files in onnxruntime, by NVIDIA's provider of TensorRT for RTX, on an RTX GPU.

Needs numpy, onnxruntime 1.23 or newer, and onnxruntime-ep-nv-tensorrt-rtx-cu13.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

NAME = "onnxruntime's TensorRT for RTX"
DEVICE = "cuda"
TOLERANCE = 5e-3  # it cannot be told to do without TF32

_PACKAGE, _PROVIDER = "onnxruntime_ep_nv_tensorrt_rtx", "NvTensorRTRTXExecutionProvider"
_LARGEST = 32  # images at once that it is prepared for, and that it is given
_MAJOR, _MINOR = 75, 76  # CUDA's numbers of the two halves of a compute capability


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", _PACKAGE)):
        return (
            "onnxruntime's provider of TensorRT for RTX is not installed: pip install --no-deps "
            "onnxruntime-ep-nv-tensorrt-rtx-cu13, beside onnxruntime-gpu"
        )
    found = _capabilities()
    if any(_takes(each) for each in found):
        return None
    here = f"here it is {', '.join(f'{major}.{minor}' for major, minor in found)}" if found else "there is none here"
    return (
        "onnxruntime's provider of TensorRT for RTX runs on NVIDIA GPUs of compute capability 8.6, 8.9, 12.0 and "
        f"newer, and {here}: verify the bundle on a machine that has one"
    )


def precisions() -> tuple[str, ...]:
    """The number types that it computes in: those of the file."""
    return ("fp32",)


def runner(
    path: str | Path, device: str = "cuda", threads: int | None = None, precision: str = "fp32"
) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32; `.provider` is the one really in use.

    device: cuda, or cuda:N, of the GPUs that it takes. Raises RuntimeError where there is none, and where onnxruntime
    would go on without the provider.
    """
    import numpy as np
    import onnxruntime

    if reason := available():
        raise RuntimeError(reason)
    kind, _, index = device.partition(":")
    if (kind, precision) != (DEVICE, "fp32"):
        raise RuntimeError(f"TensorRT for RTX computes as the file says on cuda, not in {precision} on {device!r}.")
    package = importlib.import_module(_PACKAGE)
    onnxruntime.register_execution_provider_library(_PROVIDER, package.get_library_path())
    gpus = [each for each in onnxruntime.get_ep_devices() if each.ep_name == _PROVIDER]
    if len(gpus) <= int(index or 0):
        raise RuntimeError(f"TensorRT for RTX finds {len(gpus)} GPUs here, and {device} was asked for.")
    image = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()[0]
    options = onnxruntime.SessionOptions()
    options.add_provider_for_devices([gpus[int(index or 0)]], _batches(image))
    session = onnxruntime.InferenceSession(str(path), options)
    if session.get_providers()[0] != _PROVIDER:
        raise RuntimeError(f"onnxruntime was asked for {_PROVIDER} and fell back to {session.get_providers()[0]}.")

    def run(images: np.ndarray) -> np.ndarray:
        parts = [images[start : start + _LARGEST] for start in range(0, len(images), _LARGEST)]
        return np.concatenate([session.run(None, {image.name: part})[0] for part in parts])

    run.provider = f"{_PROVIDER} {package.__version__}"  # type: ignore[attr-defined]
    return run


def _batches(image: Any) -> dict[str, str]:
    """The batch sizes that it shall be prepared for, so that it builds once."""
    sides, sizes = "x".join(str(side) for side in image.shape[1:]), {"min": 1, "opt": 8, "max": _LARGEST}
    return {f"nv_profile_{key}_shapes": f"{image.name}:{batch}x{sides}" for key, batch in sizes.items()}


def _takes(capability: tuple[int, int]) -> bool:
    """Whether the provider takes such a GPU, by its own header."""
    return capability in ((8, 6), (8, 9)) or capability >= (12, 0)


def _capabilities() -> list[tuple[int, int]]:
    """The compute capability of each NVIDIA GPU here, as its driver says, which torch is not needed for."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, number = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []

    def half(attribute: int, gpu: int) -> int:
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, gpu)
        return number.value

    return [(half(_MAJOR, gpu), half(_MINOR, gpu)) for gpu in range(count.value)]
