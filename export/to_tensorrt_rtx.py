"""Export target `tensorrt_rtx`: model.rtx.engine for any RTX GPU of several generations, built where there is none.

Needs TensorRT for RTX, which NVIDIA gives under a licence of its own, and to_tensorrt.py beside this file. What it
builds is compiled to the end by the GPU that runs it. Turing (7.5) is left out, as products of float32 matrices are
refused there.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

FILE = "model.rtx.engine"
DESCRIPTION = (
    "for TensorRT for RTX, on GPUs of compute capability 8.0, 8.6, 8.9, 12.0 and 12.1; NVIDIA's runtime, which runs it "
    "and is not in here, has [a licence of its own]"
    "(https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/reference/sla.html)"
)
ALSO = {"model.rtx.engine.json": "what model.rtx.engine is for, and built from"}
ASKED_BY = ("trt_rtx",)
NEEDS = ("onnx",)
ROW = "TensorRT for RTX"
RUNS_ON = "cuda"
PACKAGES = ("tensorrt_rtx_bindings",)

_CAPABILITIES = {"8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121"}
_BINDINGS, _LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
_INSTALL = "pip install --no-deps tensorrt-rtx-cu13-bindings onnxruntime-ep-nv-tensorrt-rtx-cu13"


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    try:
        _bindings()
    except (ImportError, OSError) as error:
        return f"TensorRT for RTX cannot be loaded ({error}): {_INSTALL}"
    return None


def write(
    student: torch.nn.Module | None,
    example: torch.Tensor | None,
    path: str | Path,
    *,
    onnx: str | Path | None = None,
    profile: tuple[int, int, int] = (1, 8, 32),
    workspace: int = 4 << 30,
) -> dict[str, Any]:
    """Write the engine of the ONNX file `onnx`, from which alone it is built, and its sidecar; say what was built.

    Options are those of to_tensorrt.py. Raises RuntimeError when TensorRT for RTX is not there or refuses the graph.
    """
    if reason := available():
        raise RuntimeError(reason)
    if onnx is None:
        raise RuntimeError("An engine is built from ONNX: give onnx=path of a model.onnx, or export with --onnx too.")
    trt, shared, path, source = _bindings(), _to_tensorrt(), Path(path), Path(onnx)
    plan, asked, shapes = shared._build(trt, source, profile, workspace, None, _portable)
    if not shared._promised(path) <= asked:
        raise RuntimeError(f"{source.name} has no layer in the precision that the name {path.name} promises.")
    sidecar = {
        "tensorrt_rtx": trt.__version__,
        "compute_capabilities": list(_CAPABILITIES),
        "profile": shapes,
        "asked_precisions": sorted(asked),  # of the graph; what a GPU makes of it is seen there
        "onnx": source.name,
        "onnx_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "engine_sha256": hashlib.sha256(plan).hexdigest(),
    }
    shared._write_bytes(path, plan)
    shared._write_bytes(shared._sidecar(path), (json.dumps(sidecar, indent=2, sort_keys=True) + "\n").encode())
    return {"path": "tensorrt_rtx", "dynamic_batch": True, "bytes": len(plan), **sidecar}


def runner(path: str | Path, device: str = "cpu", threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32 on TensorRT for RTX; `.provider` says so.

    Raises RuntimeError where there is no GPU that the engine is for, and for an engine that is not its sidecar's.
    """
    path, shared = Path(path), _to_tensorrt()
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"{path.name} is run by way of torch: pip install torch") from error
    if not torch.cuda.is_available():
        raise RuntimeError(f"{path.name} was built and not run here: torch sees no NVIDIA GPU.")
    gpu = shared._gpu(device)
    name, here = torch.cuda.get_device_name(gpu), "{}.{}".format(*torch.cuda.get_device_capability(gpu))
    if here not in _CAPABILITIES:
        raise RuntimeError(
            f"{path.name} was built and not run here: it is for compute capability {', '.join(_CAPABILITIES)}, and "
            f"{name} has {here}."
        )
    if reason := available():
        raise RuntimeError(reason)
    trt = _bindings()
    run = shared._Engine(trt, path, _read(path, shared._sidecar(path), trt.__version__), gpu, cuda_graph=False)
    run.provider = f"TensorRT for RTX {trt.__version__} on {name}"
    return run


def _portable(trt: Any, config: Any) -> None:
    """Build for every kind of GPU that the card names, whichever is here."""
    config.num_compute_capabilities = len(_CAPABILITIES)
    for place, name in enumerate(_CAPABILITIES.values()):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), place):
            raise RuntimeError(f"TensorRT for RTX {trt.__version__} does not build for {name}.")


def _read(path: Path, sidecar: Path, version: str) -> bytes:
    """The engine's bytes, if its sidecar says that they are its own and of this version."""
    again = "Build it again from model.onnx: okdc export RUN --trt-rtx"
    try:
        plan, told = path.read_bytes(), json.loads(sidecar.read_text())
    except (OSError, ValueError) as error:
        raise RuntimeError(f"The engine and its sidecar cannot be read: {error}. {again}") from error
    if told.get("tensorrt_rtx") != version:
        raise RuntimeError(
            f"{path} is for TensorRT for RTX {told.get('tensorrt_rtx')}, and here it is {version}. {again}"
        )
    if told.get("engine_sha256") != hashlib.sha256(plan).hexdigest():
        raise RuntimeError(f"{path} is not the engine that its {sidecar.name} describes. {again}")
    return plan


def _bindings() -> Any:
    """The package, whose libraries come in another one under names that the loader does not look for."""
    found = importlib.util.find_spec(_LIBRARIES)
    for folder in found.submodule_search_locations or () if found else ():
        for library in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):
            for file in sorted(Path(folder).glob(f"{library}.so.*"))[-1:]:
                ctypes.CDLL(str(file))
    return importlib.import_module(_BINDINGS)


def _to_tensorrt() -> ModuleType:
    spec = importlib.util.spec_from_file_location("to_tensorrt", Path(__file__).with_name("to_tensorrt.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
