"""ONNX files in onnxruntime, on the CPU and by its providers for GPUs: used by the export targets that write them.

Needs numpy and onnxruntime; onnx to count a file's layers by their number types.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# What runs on which device, and how: float32 means it on CUDA too, so no TF32 (TensorRT's provider has no such switch).
_PROVIDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
    "tensorrt": ("TensorrtExecutionProvider", {}),
}
_LARGEST = 32  # images at once that TensorRT's provider is prepared for, and that it is given
_TYPES = {1: "fp32", 2: "int8", 3: "int8", 10: "fp16", 16: "bf16"}  # onnx.TensorProto's numbers of what layers use


class Session:
    """A file, or its bytes, as a function: (B, C, H, W) float32 -> (B, classes) float32.

    `.provider` is the one really in use. Raises RuntimeError where that is not the one of `device`.
    """

    def __init__(self, model: str | bytes, device: str = "cpu", threads: int | None = None) -> None:
        import onnxruntime

        kind, _, index = device.partition(":")
        if kind not in _PROVIDERS:
            raise RuntimeError(f"onnxruntime cannot run on {device!r} here: give cpu, cuda, cuda:N or tensorrt.")
        wanted, settings = _PROVIDERS[kind]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: a GPU build says much on a machine without one
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        self._model = model
        if kind != "cpu":
            _preload(kind)
        settings = settings | ({"device_id": index} if index else {})
        try:
            if kind == "tensorrt":
                settings |= shapes(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))
            # Else onnxruntime goes on on the CPU, now or in the middle of a run, when the provider fails.
            self._session = onnxruntime.InferenceSession(model, options, [(wanted, settings)], enable_fallback=0)
        except Exception as error:  # onnxruntime's own errors share no base class
            name, said = "the exported model", str(error)
            if isinstance(model, str):  # without its place, which may be gone soon
                name = Path(model).name
                said = said.replace(model, name)
            raise RuntimeError(f"onnxruntime cannot load {name}: {said}") from error
        self.provider: str = self._session.get_providers()[0]
        if self.provider != wanted:
            raise RuntimeError(
                f"onnxruntime was asked for {wanted} and fell back to {self.provider}: the libraries it needs are "
                "missing or of another version; pip install 'onnxruntime-gpu[cuda,cudnn]' (and, for the TensorRT "
                "provider, 'tensorrt<11'), or use the cpu device."
            )
        self._input = self._session.get_inputs()[0].name
        self._largest = _LARGEST if kind == "tensorrt" else None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        import numpy as np

        size = self._largest or len(images) or 1
        parts = [images[start : start + size] for start in range(0, len(images) or 1, size)]
        outputs = [self._session.run(None, {self._input: part})[0] for part in parts]
        return np.concatenate(outputs) if len(outputs) > 1 else outputs[0]

    @property
    def precisions(self) -> dict[str, int]:
        """Multiplying layers by the number type of their weights (of the second factor, where both are activations)."""
        import onnx

        graph = (onnx.load_from_string(self._model) if isinstance(self._model, bytes) else onnx.load(self._model)).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        types |= {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
        for node in graph.node:
            if node.op_type == "DequantizeLinear":
                types[node.output[0]] = types.get(node.input[2] if len(node.input) > 2 else node.input[0], 0)
        layers = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
        found = Counter(_TYPES.get(types.get(node.input[1], 0)) for node in layers)
        return {name: found[name] for name in sorted(filter(None, found))}


def _preload(kind: str) -> None:
    """Load NVIDIA's libraries from their Python packages: where nothing else has, as torch does, they are not found."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):  # the session says what is missing
        onnxruntime.preload_dlls()
        if kind == "tensorrt":
            importlib.import_module("tensorrt")


def shapes(session: Any) -> dict[str, str]:
    """The batch sizes that TensorRT's provider shall be prepared for, so that it builds once."""
    image = session.get_inputs()[0]
    sides = "x".join(str(side) for side in image.shape[1:])
    sizes = {"min": 1, "opt": 8, "max": _LARGEST}
    return {f"trt_profile_{key}_shapes": f"{image.name}:{batch}x{sides}" for key, batch in sizes.items()}
