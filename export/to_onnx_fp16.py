"""Export target `onnx_fp16`: model.fp16.onnx, half the size of model.onnx, with float32 inputs and outputs.

Needs torch, numpy, onnx, onnxscript and onnxruntime, and to_onnx.py beside this file. GPUs gain speed by it; CPUs run
it, mostly no faster.
"""

from __future__ import annotations

import importlib
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

FILE = "model.fp16.onnx"
DESCRIPTION = "in float16, with float32 inputs and outputs"
ASKED_BY = ("fp16",)
PRECISION = "fp16"
TOLERANCE = 1e-2
PREDICT = True

_LARGEST = 30_000.0  # float16 ends at 65,504, and other images give larger numbers than those tried


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
) -> dict[str, Any]:
    """Convert the float32 ONNX file `onnx` (else `student`, exported first) to float16, and say what was written.

    Nodes that give or take numbers near the end of float16 on `calibration` (N, C, H, W) float32, or on noise, stay in
    float32: onnxruntime's CPU computes them in float32 anyway, so that only a GPU would show the overflow. Raises
    RuntimeError when onnxruntime cannot convert the graph, or it overflows nevertheless.
    """
    import numpy as np
    import onnx as onnx_package
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    started, to_onnx, writing = time.perf_counter(), _beside("to_onnx"), _beside("onnx_writing")
    with tempfile.TemporaryDirectory() as folder, writing.quiet():
        source = Path(onnx) if onnx else Path(folder) / to_onnx.FILE
        if onnx is None:
            to_onnx.write(student, example, source, opset=opset, metadata=metadata)
        model = onnx_package.load(source)
        images = calibration[:8] if calibration is not None else _noise(model)
        large = _large(model, images)
        expected = to_onnx.runner(source)(images)
        proto = convert_float_to_float16(model, keep_io_types=True, node_block_list=list(large))
        _straighten(proto)
        ONNXModel(proto).topological_sort()  # the converter appends its casts at the end
        writing.plain(proto)
        onnx_package.checker.check_model(proto)
        given = _beside("onnx_session").Session(proto.SerializeToString())(images)
        if not np.isfinite(given).all():
            raise RuntimeError("the network overflows in float16: ship it in float32.")
    writing.write_bytes(Path(path), proto.SerializeToString())
    return {
        "bytes": Path(path).stat().st_size,
        "seconds": round(time.perf_counter() - started, 2),
        "rel_error": float(abs(given - expected).max() / abs(expected).max()),
        "kept_in_float": [{"layer": name, "largest": value} for name, value in large.items()],
    }


def runner(path: str | Path, device: str = "cpu", threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32 on onnxruntime, as that of to_onnx.py."""
    return _beside("to_onnx").runner(path, device, threads)


def _beside(name: str) -> ModuleType:
    """The module of that name next to this file."""
    return importlib.import_module(f".{name}" if __package__ else name, __package__)


def _noise(model: onnx.ModelProto) -> np.ndarray:
    import numpy as np

    shape = (8, *(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]))
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _large(model: onnx.ModelProto, images: np.ndarray) -> dict[str, float]:
    """The nodes that give or take larger numbers than float16 is safe for, and how large these are."""
    import numpy as np
    import onnx
    import onnxruntime

    inferred = onnx.shape_inference.infer_shapes(model)
    values = [each for each in inferred.graph.value_info if each.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    inferred.graph.output.extend(values)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(inferred.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    largest = dict.fromkeys(names, 0.0)
    for image in images:  # one at a time: every activation is kept
        for name, value in zip(names, session.run(names, {session.get_inputs()[0].name: image[None]})):
            largest[name] = max(largest[name], float(np.abs(value).max(initial=0)))
    ends = ((node.name, [*node.input, *node.output]) for node in model.graph.node)
    nodes = ((node, max(largest.get(name, 0.0) for name in names)) for node, names in ends)
    return {name: value for name, value in nodes if not value <= _LARGEST}


def _straighten(proto: onnx.ModelProto) -> None:
    """Take out the way through float16 that the converter puts between two nodes in float32: it would overflow.

    And the casts that it makes twice, of weights that two such nodes share.
    """
    import onnx

    half, full = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    casts = [(node, node.attribute[0].i) for node in proto.graph.node if node.op_type == "Cast"]
    exact = {node.output[0]: node.input[0] for node, to in casts if to == half}
    detours = {node.output[0]: exact[node.input[0]] for node, to in casts if to == full and node.input[0] in exact}
    for output in proto.graph.output:  # which must keep its name
        detours.pop(output.name, None)
    for node in proto.graph.node:
        node.input[:] = [detours.get(name, name) for name in node.input]
    nodes = {node.output[0]: node for node in proto.graph.node if node.output[0] not in detours}
    used = {name for node in nodes.values() for name in node.input} | {value.name for value in proto.graph.output}
    nodes = {name: node for name, node in nodes.items() if name in used or name not in exact}
    del proto.graph.node[:]
    proto.graph.node.extend(nodes.values())
