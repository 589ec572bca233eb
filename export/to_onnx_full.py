"""Export target `onnx_full`: model.full.onnx, model.onnx with its preprocessing in front and probabilities at its end.

Needs numpy, onnx and onnxruntime. Decoding stays outside, and with it what depends on the kind of file: turning photos
upright by their EXIF orientation, and making grey or RGB of 8 bits of whatever else there is.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import torch

FILE = "model.full.onnx"
DESCRIPTION = (
    "decoded images in, uint8 (N, H, W, 3) of any one size (1 for a grey network), and probabilities out: it resizes, "
    "crops and normalises by itself; turn photos upright and convert them to RGB or grey of 8 bits before"
)
ASKED_BY = ("embed_preprocess",)
NEEDS = ("onnx",)
RAW = True

_OLDEST = 18  # the opset since which Resize smooths where it makes smaller, as Pillow does
_FILTERS: dict[str, dict[str, Any]] = {
    "bilinear": {"mode": "linear"},
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5},
}


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"this export needs {' and '.join(missing)}: pip install {' '.join(missing)}" if missing else None


def write(
    student: torch.nn.Module | None,
    example: torch.Tensor | None,
    path: str | Path,
    *,
    onnx: Path,
    preprocess: dict[str, Any],
    activation: str = "Softmax",
) -> dict[str, Any]:
    """Write the file `onnx`, which takes what predict.py makes of an image, with that done inside it.

    "images" (N, H, W, C) uint8 -> "probabilities" and "logits" (N, classes). preprocess: preprocess.json. activation:
    Softmax, or Sigmoid of several labels. Neither the
    student nor the example is used. Raises NotImplementedError where ONNX cannot resize or crop as training did, and
    where nobody knows how that was.
    """
    import onnx as package

    if preprocess.get("mean") is None:
        raise NotImplementedError("how an image becomes an input is not known: say it, --mean and --std")
    network = package.load(onnx)
    opset = next(entry.version for entry in network.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < _OLDEST:
        raise NotImplementedError(
            f"resizing as training did needs opset {_OLDEST} or newer, and {onnx.name} has {opset}."
        )
    graph = _Graph()
    graph.finish(network, _preprocessing(graph, preprocess), activation)
    package.checker.check_model(network, full_check=True)
    part = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        package.save(network, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return {"opset": opset, "ir_version": network.ir_version, "bytes": Path(path).stat().st_size}


def runner(path: str | Path, device: str = "cpu", threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function uint8 (B, H, W, C) -> logits (B, classes) float32 on onnxruntime; `.provider` is the one in use."""
    import onnxruntime

    if device != "cpu":
        raise RuntimeError(f"{Path(path).name} is run on the CPU, where its resizing is, not on {device!r}.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        return session.run(["logits"], {"images": images})[0]

    run.provider = session.get_providers()[0]  # type: ignore[attr-defined]
    return run


class _Graph:
    """Nodes and constants that are put in front of a network."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One more node; returns the name of its output."""
        from onnx import helper

        name = f"preprocess/{len(self.nodes)}_{kind}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: Sequence[Any], kind: str) -> str:
        """One more constant; returns its name."""
        import numpy as np
        from onnx import numpy_helper

        name = f"preprocess/constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype=kind), name))
        return name

    def finish(self, network: onnx.ModelProto, pixels: str, activation: str) -> None:
        """Put all of it before the network, which gets `pixels` for its input, and the activation behind."""
        from onnx import TensorProto, helper

        inner, (taken,), (logits,) = network.graph, network.graph.input, network.graph.output
        channels, classes = (value.type.tensor_type.shape.dim[1].dim_value for value in (taken, logits))
        self.nodes.append(helper.make_node("Identity", [pixels], [taken.name], name="preprocess/pixels"))
        last = helper.make_node(activation, [logits.name], ["probabilities"], name="probabilities")
        if activation == "Softmax":
            last.attribute.append(helper.make_attribute("axis", 1))
        shape = ["batch", "height", "width", channels]
        images = helper.make_tensor_value_info("images", TensorProto.UINT8, shape)
        odds = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", classes])
        nodes, outputs = [*self.nodes, *inner.node, last], [odds, *inner.output]
        for field in ("node", "input", "output"):
            del getattr(inner, field)[:]
        inner.node.extend(nodes)
        inner.input.extend([images])
        inner.output.extend(outputs)
        inner.initializer.extend(self.constants)


def _preprocessing(graph: _Graph, config: dict[str, Any]) -> str:
    """The nodes from "images" to the network's input, step by step as in predict.py; returns that input's name."""
    from onnx import TensorProto

    channels, height, width = config["input_size"]
    name = config.get("interpolation", "bilinear")
    if name not in _FILTERS:
        raise NotImplementedError(f"the images are resized by {name!r}, which ONNX cannot: bilinear and bicubic only.")
    pixels = graph("Transpose", "images", perm=[0, 3, 1, 2])
    size = _resized(graph, config)
    kept = graph("Slice", graph("Shape", pixels), *(graph.constant([each], "int64") for each in (0, 2)))
    pixels = graph(
        "Resize", pixels, "", "", graph("Concat", kept, size, axis=0),
        antialias=1, exclude_outside=1, coordinate_transformation_mode="half_pixel", **_FILTERS[name],
    )  # fmt: skip
    # The middle: half of what is too much, rounded to even as Python does.
    crop = graph.constant([height, width], "int64")
    half = graph(
        "Mul", graph("Cast", graph("Sub", size, crop), to=TensorProto.DOUBLE), graph.constant([0.5], "float64")
    )
    start = graph("Cast", graph("Round", half), to=TensorProto.INT64)
    pixels = graph("Slice", pixels, start, graph("Add", start, crop), graph.constant([2, 3], "int64"))
    pixels = graph("Reshape", pixels, graph.constant([0, channels, height, width], "int64"))
    pixels = graph("Div", graph("Cast", pixels, to=TensorProto.FLOAT), graph.constant([255], "float32"))
    mean, std = (graph.constant([[[[each]] for each in config[key]]], "float32") for key in ("mean", "std"))
    return graph("Div", graph("Sub", pixels, mean), std)


def _resized(graph: _Graph, config: dict[str, Any]) -> str:
    """The (height, width) that an image is resized to, before the middle of it is taken."""
    from onnx import TensorProto

    _, height, width = config["input_size"]
    scale, mode = config.get("crop_pct") or 0.875, config.get("crop_mode") or "center"
    if mode not in ("center", "squash") or scale > 1:
        raise NotImplementedError(f"crop_mode {mode!r} with crop_pct {scale:g} adds borders, which this file cannot.")
    target = math.floor(height / scale), math.floor(width / scale)
    if mode == "squash":
        return graph.constant(target, "int64")
    size = graph("Shape", "images", start=1, end=3)
    if target[0] == target[1]:  # the shorter side is that, the longer one in proportion, cut to whole pixels
        shorter = graph("ReduceMin", size, keepdims=1)
        return graph("Div", graph("Mul", size, graph.constant([target[0]], "int64")), shorter)
    exact = graph("Cast", size, to=TensorProto.DOUBLE)
    ratio = graph("ReduceMin", graph("Div", exact, graph.constant(target, "float64")), keepdims=1)
    return graph("Cast", graph("Round", graph("Div", exact, ratio)), to=TensorProto.INT64)
