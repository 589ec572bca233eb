"""Which onnxruntime a file needs: what predict.py is told to install."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# The first onnxruntime to take an opset and a version of the format: by onnx's docs/Versioning.md (which onnx has them)
# and onnxruntime's compatibility page (which onnxruntime has which onnx; the later one where that leaves two open).
_SINCE = (
    ("1.7", 13, 7), ("1.8", 14, 7), ("1.10", 15, 8), ("1.11", 16, 8), ("1.12", 17, 8), ("1.14", 18, 8), ("1.15", 19, 9),
    ("1.17", 20, 9), ("1.18", 21, 10), ("1.21", 22, 10), ("1.22", 23, 11),
)  # fmt: skip


def text(files: Sequence[Path]) -> str:
    """The requirements.txt of predict.py for the ONNX files of a bundle that it runs."""
    oldest = _SINCE[max((_index(file) for file in files), default=0)][0]
    return f"# onnxruntime older than 1.19 needs numpy<2\nnumpy\npillow\nonnxruntime>={oldest}\n"


def _index(file: Path) -> int:
    """The place in the table of the oldest onnxruntime that takes a file; the newest one's where none is known to."""
    import onnx

    model = onnx.load(file, load_external_data=False)
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    fit = (i for i, (_, newest, form) in enumerate(_SINCE) if newest >= opset and form >= model.ir_version)
    return next(fit, len(_SINCE) - 1)
