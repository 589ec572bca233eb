"""Quantising an ONNX model by onnxruntime (QDQ), and holding what comes of it against float32, on training images.

Used by to_onnx_int8.py and to_onnx_int8_finetuned.py; needs onnx_writing.py beside it, numpy, onnx and onnxruntime.
"""

from __future__ import annotations

import importlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import onnx

_SECONDS = 90.0  # of CPU time for trying layers one at a time; those that are not reached count as harmless
_BATCH = 8
_HISTOGRAM_IMAGES = 64  # histograms look at every single activation
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SOFTMAX = "Softmax"  # stays in float: onnxruntime's 8-bit kernel gives 0 for a single score, and rounds down
_NORM = (
    "LayerNormalization"  # stays in float with the sums before it, of all blocks so far: 8 bits tell too little there
)


class Preset(NamedTuple):
    """How onnxruntime is to quantise: what a CPU computes fast, or what TensorRT accepts."""

    symmetric: bool
    operators: tuple[str, ...]  # none: all that onnxruntime knows
    quantize_bias: bool


PRESETS = {
    "cpu": Preset(symmetric=False, operators=(), quantize_bias=True),
    "tensorrt": Preset(symmetric=True, operators=("Conv", "Gemm", "MatMul", "Add"), quantize_bias=False),
}


class Try(NamedTuple):
    """A quantised model and how it did: predictions that agree (per cent), signal to noise of the logits (dB)."""

    proto: onnx.ModelProto
    agreement: float
    sqnr_db: float


class Bench:
    """A float32 model with the images on which it is quantised and tried."""

    def __init__(
        self,
        source: Path,
        images: np.ndarray,
        preset: Preset,
        folder: Path,
        same: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> None:
        import onnx
        from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.folder, self.preset, self.source, self.same = folder, preset, folder / "float.onnx", same or _same_class
        self.original = onnx.load(source)
        quant_pre_process(str(source), str(self.source), skip_symbolic_shape=True)
        self.model = onnx.load(self.source)
        self.fit, self.probe = images[::2], images[1::2]
        self.input = self.model.graph.input[0].name
        started = time.process_time()
        self.expected = self.logits(self.model, self.probe)
        self.seconds = (time.process_time() - started) / len(self.probe)
        normed = any(node.op_type == _NORM for node in self.model.graph.node)
        in_float = {_SOFTMAX, _NORM, "Add"} if normed else {_SOFTMAX}
        self.operators = list(preset.operators) or sorted({*QDQRegistry, *QLinearOpsRegistry} - in_float)
        self.layers = [node.name for node in self.model.graph.node if node.op_type in _LAYERS]
        self.units = self._units()
        self.ends = self.layers[-1:] if self.expected.ndim == 4 else []
        self.reduce_range = not preset.symmetric and _saturates()
        self._ranges: dict[str, Any] = {}

    def _units(self) -> dict[str, list[str]]:
        """The nodes that stay in float together: each multiplying layer by itself, all others by their kind."""
        units: dict[str, list[str]] = {}
        for node in self.model.graph.node:
            if node.op_type in self.operators:
                unit = node.name if node.op_type in _LAYERS else f"every {node.op_type}"
                units.setdefault(unit, []).append(node.name)
        return units

    def ranges(self, method: str) -> Any:
        """The range of each activation over the images for calibration."""
        if method not in self._ranges:
            from onnxruntime.quantization import CalibrationMethod
            from onnxruntime.quantization.calibrate import create_calibrator

            percentile = method == "percentile"
            calibrator = create_calibrator(
                self.source, self.operators, str(self.folder / "augmented.onnx"),
                CalibrationMethod.Percentile if percentile else CalibrationMethod.MinMax,
                extra_options={"symmetric": self.preset.symmetric} if percentile else {},
            )  # fmt: skip
            images = self.fit[:_HISTOGRAM_IMAGES] if percentile else self.fit
            for start in range(0, len(images), _BATCH):  # in parts: a calibrator holds all that it is given at once
                calibrator.collect_data(_Once({self.input: images[start : start + _BATCH]}))
            self._ranges[method] = calibrator.compute_data()
        return self._ranges[method]

    def attempt(self, method: str, kept: Sequence[str] = (), only: str | None = None, images: int = sys.maxsize) -> Try:
        """Quantise all but the units `kept`, or the unit `only`, and hold that against float32 on some images."""
        import numpy as np

        proto = self._quantize(method, kept, only)
        out, expected = self.logits(proto, self.probe[:images]), self.expected[:images].astype(np.float64)
        agreement = 100 * float(self.same(out, expected).mean())
        noise, signal = np.square(out - expected).mean(), np.square(expected).mean()
        return Try(proto, agreement, float(10 * np.log10(signal / max(noise, 1e-12 * signal))))

    def damage(self, method: str) -> dict[str, float]:
        """Noise over signal of the logits when one unit alone is quantised, of every unit that time allows for."""
        damage, started = dict.fromkeys(self.units, 0.0), time.process_time()
        images = int(_SECONDS / 2 / len(damage) / self.seconds)  # the other half goes into building the graphs
        for unit in damage:
            if time.process_time() - started > _SECONDS:
                break
            damage[unit] = 10 ** (-self.attempt(method, only=unit, images=min(max(images, 4), 32)).sqnr_db / 10)
        return damage

    def _quantize(self, method: str, kept: Sequence[str], only: str | None) -> onnx.ModelProto:
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        preset, model = self.preset, onnx.ModelProto()
        model.CopyFrom(self.model)  # the quantiser changes what it is given
        symmetric = {"ActivationSymmetric": preset.symmetric, "WeightSymmetric": True}
        quantizer = QDQQuantizer(
            model, True, self.reduce_range, QuantType.QInt8, QuantType.QInt8 if preset.symmetric else QuantType.QUInt8,
            self.ranges(method), self.units[only] if only else [], [name for unit in kept for name in self.units[unit]],
            self.operators, symmetric | {"QuantizeBias": preset.quantize_bias},
        )  # fmt: skip
        quantizer.quantize_model()
        _float_inputs(quantizer.model.graph(), _SOFTMAX)
        quantizer.model.clean_initializers()
        quantizer.model.topological_sort()
        return self.finish(quantizer.model.model)

    def finish(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        """Without domains that no node uses and what onnxruntime notes and spells out, with the original's metadata."""
        import onnx

        used = {node.domain for node in proto.graph.node}
        domains = [entry for entry in proto.opset_import if entry.domain in used | {"", "ai.onnx"}]
        del proto.opset_import[:], proto.metadata_props[:]
        proto.opset_import.extend(domains)
        proto.metadata_props.extend(self.original.metadata_props)
        _onnx_writing().plain(proto)
        onnx.checker.check_model(proto)
        return proto

    def logits(self, proto: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
        """What onnxruntime computes of a model for (N, C, H, W) images."""
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        parts = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        return np.concatenate([session.run(None, {self.input: part})[0] for part in parts])


def _float_inputs(graph: onnx.GraphProto, operator: str) -> None:
    """Give the nodes of an operator their inputs as they are, not in 8 bits, in a graph that quantises them (QDQ)."""
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        back = made.get(node.input[0]) if node.op_type == operator else None
        if back is not None and back.op_type == "DequantizeLinear" and back.input[0] in made:
            node.input[0] = made[back.input[0]].input[0]
    while unused := _unused(graph):
        for node in unused:
            graph.node.remove(node)


def _unused(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    used = {name for node in graph.node for name in node.input} | {entry.name for entry in graph.output}
    return [node for node in graph.node if used.isdisjoint(node.output)]


def _same_class(out: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return out.argmax(1) == expected.argmax(1)


class _Once:
    """One batch, as onnxruntime's calibrators read it."""

    def __init__(self, batch: dict[str, np.ndarray]) -> None:
        self._batches = [batch]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._batches.pop() if self._batches else None


def _saturates() -> bool:
    """Whether this is an x86 CPU without VNNI, whose 8-bit products overflow unless weights are kept to 7 bits."""
    info = Path("/proc/cpuinfo")
    return platform.machine() in ("x86_64", "AMD64") and info.is_file() and "vnni" not in info.read_text()


def _onnx_writing() -> ModuleType:
    """The module next to this file."""
    return importlib.import_module(".onnx_writing" if __package__ else "onnx_writing", __package__)
