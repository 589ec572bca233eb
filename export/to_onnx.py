"""Export target `onnx`: one self-contained model.onnx with a dynamic batch, run by onnxruntime.

Needs torch, numpy, onnx, onnxscript and onnxruntime; timm only for networks that it can re-parameterise.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir
    import torch

FILE = "model.onnx"
DESCRIPTION = "the network in float32, for onnxruntime"
PRECISION = "fp32"
PREDICT = True
DEVICES = {"cuda": None, "tensorrt": 5e-3}  # TensorRT's provider cannot be told to do without TF32
PACKAGES = ("onnx", "onnxruntime")

_INPUT, _OUTPUT = "input", "logits"
# int8 by channels needs 13; 23 has an Attention operator that deployment runtimes cannot take yet.
_OPSETS = range(13, 23)
_WRITTEN = 18  # the oldest that torch's newer exporter writes; to older ones its files are converted
_SAME = 1e-3  # rounding is a hundred times smaller; more than this is another network
# What runs on which device, and how: float32 means it on CUDA too, so no TF32 (TensorRT's provider has no such switch).
_PROVIDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
    "tensorrt": ("TensorrtExecutionProvider", {}),
}
_LARGEST = 32  # images at once that TensorRT's provider is prepared for, and that it is given
_TYPES = {1: "fp32", 2: "int8", 3: "int8", 10: "fp16", 16: "bf16"}  # onnx.TensorProto's numbers of what layers use


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    needs = ("torch", "onnx", "onnxscript", "onnxruntime")
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"ONNX export needs {' and '.join(missing)}: pip install {' '.join(missing)}"
    return None


def write(
    student: torch.nn.Module,
    example: torch.Tensor,
    path: str | Path,
    *,
    opset: int = 20,
    metadata: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Write `student` as float32 ONNX, "input" (batch, C, H, W) -> "logits" (batch, classes), and say what was written.

    Heat maps of key points are "logits" (batch, points, height, width).
    Only the shape of `example` (B, C, H, W) is used. `student` is left untouched: a copy is put in eval mode on the
    CPU, re-parameterised (`parameters` are left) and exported; `rel_error` is the largest difference from torch over
    the largest logit, on noise. Raises RuntimeError, and leaves what was at `path` alone, when no exporter gives a file
    that agrees: its first line has the reasons, what follows all that the exporters said.
    """
    if opset not in _OPSETS:
        raise RuntimeError(f"opset {opset} is not supported: give one from {_OPSETS[0]} to {_OPSETS[-1]} (20 is best).")
    started = time.perf_counter()
    with _quiet():
        proto, facts = _export(student, tuple(example.shape[1:]), opset, metadata or {})
    _write_bytes(Path(path), proto.SerializeToString())
    return {
        "opset": opset,
        "ir_version": proto.ir_version,
        "nodes": len(proto.graph.node),
        "dynamic_batch": True,
        "bytes": Path(path).stat().st_size,
        "seconds": round(time.perf_counter() - started, 2),
        **facts,
    }


def runner(path: str | Path, device: str = "cpu", threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32 on onnxruntime; `.provider` is the one really in use.

    `.precisions` counts the file's multiplying layers by number type. Raises RuntimeError when onnxruntime cannot use
    `device`, where it would silently use the CPU instead.
    """
    return _Session(str(path), device, threads)


class _Session:
    """An onnxruntime session as a function."""

    def __init__(self, model: str | bytes, device: str, threads: int | None) -> None:
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
                settings |= _shapes(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))
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


def _shapes(session: Any) -> dict[str, str]:
    """The batch sizes that TensorRT's provider shall be prepared for, so that it builds once."""
    image = session.get_inputs()[0]
    sides = "x".join(str(side) for side in image.shape[1:])
    sizes = {"min": 1, "opt": 8, "max": _LARGEST}
    return {f"trt_profile_{key}_shapes": f"{image.name}:{batch}x{sides}" for key, batch in sizes.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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


def _export(
    student: torch.nn.Module, shape: tuple[int, ...], opset: int, metadata: dict[str, str]
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model of the first exporter whose file agrees with torch: two networks in a hundred need not the first."""
    import onnx
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Noise, not the caller's images: they would travel in the file. Three, as one would be taken for a constant.
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network = copy.deepcopy(student).to("cpu", torch.float32).eval()
        expected = _logits(network, images)
        network = _reparameterized(network)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        failures = []
        for way, exporter, context in (
            ("dynamo", _dynamo, contextlib.nullcontext()),
            ("math_sdpa", _dynamo, sdpa_kernel(SDPBackend.MATH)),  # fused attention breaks some windowed networks
            ("torchscript", _torchscript, contextlib.nullcontext()),
        ):
            try:
                with context:
                    proto = _clean(exporter(network, images, opset), opset)
                onnx.helper.set_model_props(proto, metadata)
                _check(proto, opset)
                relative = _difference(proto, images.numpy(), expected)
                return proto, {"path": way, "rel_error": relative, "parameters": parameters}
            except Exception as error:  # the exporters raise anything
                failures.append((way, error))
    raise RuntimeError(_refusal(failures, opset))


def _refusal(failures: list[tuple[str, Exception]], opset: int) -> str:
    """Why each exporter failed: the line that says it of all of them, then everything that they said."""
    reasons: dict[str, list[str]] = {}
    for way, error in failures:
        root: BaseException = error
        while root.__cause__ is not None:  # around it torch puts advice on how to report its bugs
            root = root.__cause__
        line = (str(root).strip().splitlines() or [""])[0]
        reasons.setdefault(f"{type(root).__name__}: {line}", []).append(way)
    summary = "; ".join(f"{' and '.join(ways)}: {reason}" for reason, ways in reasons.items())
    whole = [f"{way}: {type(error).__name__}: {error}" for way, error in failures]
    return "\n\n".join([f"torch.onnx cannot export this network to opset {opset}. {summary}", *whole])


def _logits(network: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    import torch

    output = network(images)
    if not isinstance(output, torch.Tensor) or output.ndim not in (2, 4):
        found = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise RuntimeError(
            "The network must return one tensor of logits (batch, classes), or of heat maps (batch, points, height, "
            f"width); it returned {found}."
        )
    return output.numpy()


def _reparameterized(network: torch.nn.Module) -> torch.nn.Module:
    """The network with its parallel branches fused where timm knows how (MobileOne, FastViT, RepVGG, LeViT, ...)."""
    if importlib.util.find_spec("timm") is None:
        return network
    from timm.utils import reparameterize_model

    return reparameterize_model(network, inplace=True).eval()


def _difference(proto: onnx.ModelProto, images: np.ndarray, expected: np.ndarray) -> float:
    """The relative difference of the file's logits at two batch sizes; RuntimeError if that is not rounding."""
    session = _Session(proto.SerializeToString(), "cpu", 1)
    errors = [abs(session(images[:batch]) - expected[:batch]).max() for batch in (1, len(images))]
    relative = float(max(errors) / abs(expected).max())
    if not relative <= _SAME:  # also when it is not a number
        raise RuntimeError(f"its logits differ from torch's by {relative:.1e} of the largest")
    return relative


def _dynamo(network: torch.nn.Module, images: torch.Tensor, opset: int) -> onnx_ir.Model:
    import torch

    program = torch.onnx.export(
        network, (images,), dynamo=True, opset_version=max(opset, _WRITTEN), input_names=[_INPUT],
        output_names=[_OUTPUT], dynamic_shapes=({0: "batch"},), external_data=False, verbose=False,
    )  # fmt: skip
    assert program is not None
    return program.model


def _torchscript(network: torch.nn.Module, images: torch.Tensor, opset: int) -> onnx_ir.Model:
    import onnx
    import onnx_ir
    import torch

    buffer = io.BytesIO()
    torch.onnx.export(
        network, (images,), cast("Any", buffer), dynamo=False, opset_version=opset, input_names=[_INPUT],
        output_names=[_OUTPUT], dynamic_axes={_INPUT: {0: "batch"}, _OUTPUT: {0: "batch"}},
    )  # fmt: skip
    return onnx_ir.from_proto(onnx.load_from_string(buffer.getvalue()))


def _clean(model: onnx_ir.Model, opset: int) -> onnx.ModelProto:
    """The ModelProto in `opset`, without the exporter's notes (stack traces with local paths) and nodes for naught."""
    import onnx_ir
    from onnx.version_converter import convert_version
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, IdentityEliminationPass

    for tidy in (IdentityEliminationPass(), ClearMetadataAndDocStringPass()):
        model = tidy(model).model
    proto = _plain(onnx_ir.to_proto(model))
    for value in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]:
        value.ClearField("metadata_props")
    if max(entry.version for entry in proto.opset_import if not entry.domain) <= opset:
        return proto
    try:
        return _plain(convert_version(proto, opset))
    except Exception as error:
        named = re.search(r"No Previous Version of (\w+)|No Adapter .* for (\w+)", str(error))
        operator = next(filter(None, named.groups()), None) if named else None
        reason = f"its {operator} cannot be put into opset {opset}" if operator else str(error)
        raise RuntimeError(f"{reason} (written as opset {_WRITTEN})") from None


def _plain(proto: onnx.ModelProto) -> onnx.ModelProto:
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


def _check(proto: onnx.ModelProto, opset: int) -> None:
    """Raise RuntimeError unless the model is valid ONNX of that opset with one input, one output and a free batch."""
    import onnx

    onnx.checker.check_model(proto, full_check=True)
    written = {entry.domain: entry.version for entry in proto.opset_import}
    if written.get("", written.get("ai.onnx")) != opset:
        raise RuntimeError(f"it wrote opset {written} where {opset} was asked for")
    for kind, name, values in (("input", _INPUT, proto.graph.input), ("output", _OUTPUT, proto.graph.output)):
        if [value.name for value in values] != [name]:
            raise RuntimeError(f"the graph must have one {kind} {name!r}, and has {[value.name for value in values]}")
        if not values[0].type.tensor_type.shape.dim[0].dim_param:
            raise RuntimeError(f"the batch of the graph's {kind} is fixed: the network mixes it into its shapes")


def _write_bytes(path: Path, data: bytes) -> None:
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
