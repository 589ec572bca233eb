"""Runtime `opencv`: ONNX files in OpenCV's dnn module, on the CPU in float32.

Needs numpy and cv2 (opencv-python, or opencv-python-headless on a machine without a screen).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

NAME = "OpenCV"


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    return None if importlib.util.find_spec("cv2") else "OpenCV is not installed: pip install opencv-python-headless"


def precisions() -> tuple[str, ...]:
    """The number types that it computes in."""
    return ("fp32",)


def runner(
    path: str | Path, device: str = "cpu", threads: int | None = None, precision: str = "fp32"
) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32; `.provider` names the version.

    threads: of the whole process, which OpenCV knows no less of. Raises RuntimeError for any `precision` but fp32.
    """
    import cv2
    import numpy as np

    if (device, precision) != ("cpu", "fp32"):
        raise RuntimeError(f"OpenCV runs on the CPU in fp32 here, not on {device!r} in {precision}.")
    cv2.setNumThreads(threads or -1)
    network = cv2.dnn.readNetFromONNX(str(path))

    def run(images: np.ndarray) -> np.ndarray:
        network.setInput(images)
        return np.array(network.forward())

    run.provider = f"OpenCV {cv2.__version__}"  # type: ignore[attr-defined]
    return run
