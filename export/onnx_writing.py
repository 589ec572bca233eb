"""What the export targets of ONNX files share when they write: quiet exporters, plain files, put in place whole.

Needs onnx.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, log lines or prints of the exporters; everything is as before afterwards."""
    before, said = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            _no_graphs(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _no_graphs() -> Iterator[None]:
    """torch's older exporter writes the whole graph, thousands of lines, past Python when it fails."""
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    with open(os.devnull, "w") as nothing:
        for stream in kept:
            os.dup2(nothing.fileno(), stream)
    try:
        yield
    finally:
        for stream, copy_of_it in kept.items():
            os.dup2(copy_of_it, stream)
            os.close(copy_of_it)


def plain(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model, stated in the oldest format that holds it, and without attributes that say what is so without them.

    OpenCV takes a hard sigmoid that states the usual `beta` for a hard swish, and older runtimes refuse newer formats.
    Which format an opset, and so each of its number types, needs is in onnx's docs/Versioning.md; functions need 8.
    """
    import onnx

    versions = {entry.domain: entry.version for entry in proto.opset_import}
    for node in (node for part in (proto.graph, *proto.functions) for node in _nodes(part)):
        version = versions.get(node.domain, 0)
        if onnx.defs.has(node.op_type, version, node.domain):
            known = onnx.defs.get_schema(node.op_type, version, node.domain).attributes
            told = [each for each in node.attribute if each.name not in known or not _usual(each, known[each.name])]
            del node.attribute[:]
            node.attribute.extend(told)
    oldest = onnx.helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True)
    overloaded = any(function.overload for function in proto.functions)
    proto.ir_version = max(oldest, 10 if overloaded else 8 if proto.functions else 0)
    return proto


def fit_windows(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with no window of a pooling larger than the map that it looks at, which pools the same numbers.

    A window of 2 pixels on a map of 1 is refused by OpenVINO and computed wrongly, without a word, by OpenCV.
    """
    import onnx

    known = onnx.shape_inference.infer_shapes(proto).graph
    shapes = {entry.name: entry.type.tensor_type.shape.dim for entry in (*known.input, *known.value_info)}
    for node in proto.graph.node:
        told = {entry.name: entry for entry in node.attribute}
        padded = "pads" in told and any(told["pads"].ints)
        if node.op_type in ("AveragePool", "MaxPool") and node.input[0] in shapes and not padded:
            window, sides = told["kernel_shape"].ints, shapes[node.input[0]][2:]
            window[:] = [min(size, side.dim_value or size) for size, side in zip(window, sides, strict=True)]
    return proto


def _usual(attribute: onnx.AttributeProto, known: onnx.defs.OpSchema.Attribute) -> bool:
    """Whether an attribute has the value that the operator has without it, where there is such a value."""
    import onnx

    default = known.default_value
    if not default.type or attribute.ref_attr_name:
        return False
    value = onnx.helper.get_attribute_value
    return attribute.type == default.type and value(attribute) == value(default)


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Every node, also of graphs within nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _nodes(inner)


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
