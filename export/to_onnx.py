"""Export target `onnx`: one self-contained model.onnx with a dynamic batch, run by onnxruntime.

Needs torch, numpy, onnx, onnxscript and onnxruntime, and onnx_session.py and onnx_writing.py beside it; timm only for
networks that it can re-parameterise.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
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
    with _beside("onnx_writing").quiet():
        proto, facts = _export(student, tuple(example.shape[1:]), opset, metadata or {})
    _beside("onnx_writing").write_bytes(Path(path), proto.SerializeToString())
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
    return _beside("onnx_session").Session(str(path), device, threads)


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
    """The relative difference of the file's logits at each batch size; RuntimeError if that is not rounding."""
    session = _beside("onnx_session").Session(proto.SerializeToString(), "cpu", 1)
    errors = []
    for batch in range(1, len(images) + 1):
        logits = session(images[:batch])
        if len(logits) != batch:  # numbers of all images became a constant, which one image alone is spread over
            raise RuntimeError(
                f"it gives {len(logits)} answers for {batch} image: numbers made outside torch are fixed"
            )
        errors.append(abs(logits - expected[:batch]).max())
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
    writing = _beside("onnx_writing")
    proto = writing.fit_windows(writing.plain(onnx_ir.to_proto(model)))
    for value in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]:
        value.ClearField("metadata_props")
    if max(entry.version for entry in proto.opset_import if not entry.domain) <= opset:
        return proto
    try:
        return writing.plain(convert_version(proto, opset))
    except Exception as error:
        named = re.search(r"No Previous Version of (\w+)|No Adapter .* for (\w+)", str(error))
        operator = next(filter(None, named.groups()), None) if named else None
        reason = f"its {operator} cannot be put into opset {opset}" if operator else str(error)
        raise RuntimeError(f"{reason} (written as opset {_WRITTEN})") from None


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


def _beside(name: str) -> ModuleType:
    """The module of that name next to this file."""
    return importlib.import_module(f".{name}" if __package__ else name, __package__)
