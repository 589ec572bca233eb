"""Export target `tensorrt_rtx`: model.rtx.engine for any RTX GPU of several generations, built where there is none.

Needs TensorRT for RTX, which NVIDIA gives under a licence of its own, and tensorrt_build.py and tensorrt_engine.py
beside this file. What it builds is compiled to the end by the GPU that runs it. Turing (7.5) is left out, as products
of float32 matrices are refused there.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
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

    The precision is the graph's, and options are those of to_tensorrt.py. Raises RuntimeError when TensorRT for RTX is
    not there, refuses the graph, or finds no layer in the precision that a `path` such as model.fp16.rtx.engine
    promises.
    """
    if reason := available():
        raise RuntimeError(reason)
    if onnx is None:
        raise RuntimeError("An engine is built from ONNX: give onnx=path of a model.onnx, or export with --onnx too.")
    trt, shared, path, source = _bindings(), _beside("tensorrt_engine"), Path(path), Path(onnx)
    plan, asked, shapes = _beside("tensorrt_build").build(trt, source, profile, workspace, None, _portable)
    if not shared.promised(path) <= asked:
        raise RuntimeError(f"{source.name} has no layer in the precision that the name {path.name} promises.")
    facts = {
        "tensorrt_rtx": trt.__version__,
        "compute_capabilities": list(_CAPABILITIES),
        "profile": shapes,
        "asked_precisions": sorted(asked),  # of the graph; what a GPU makes of it is seen there
    }
    told = shared.write(path, plan, source, facts)
    return {"path": "tensorrt_rtx", "dynamic_batch": True, "bytes": len(plan), **told}


def runner(path: str | Path, device: str = "cpu", threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32 on TensorRT for RTX; `.provider` says so.

    Raises RuntimeError where there is no GPU that the engine is for, and for an engine that is not its sidecar's.
    """
    path, shared = Path(path), _beside("tensorrt_engine")
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"{path.name} is run by way of torch: pip install torch") from error
    if not torch.cuda.is_available():
        raise RuntimeError(f"{path.name} was built and not run here: torch sees no NVIDIA GPU.")
    gpu = shared.gpu_of(device)
    name, here = torch.cuda.get_device_name(gpu), "{}.{}".format(*torch.cuda.get_device_capability(gpu))
    if here not in _CAPABILITIES:
        raise RuntimeError(
            f"{path.name} was built and not run here: it is for compute capability {', '.join(_CAPABILITIES)}, and "
            f"{name} has {here}."
        )
    if reason := available():
        raise RuntimeError(reason)
    trt = _bindings()
    plan = shared.read(path, {"tensorrt_rtx": trt.__version__}, _rebuild)
    run = shared.Engine(trt, path, plan, gpu, _rebuild(path))
    run.provider = f"TensorRT for RTX {trt.__version__} on {name}"
    return run


def _portable(trt: Any, config: Any) -> None:
    """Build for every kind of GPU that the card names, whichever is here."""
    config.num_compute_capabilities = len(_CAPABILITIES)
    for place, name in enumerate(_CAPABILITIES.values()):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, name), place):
            raise RuntimeError(f"TensorRT for RTX {trt.__version__} does not build for {name}.")


def _rebuild(source: Path) -> str:
    return "Build it again from its ONNX: okdc export RUN --trt-rtx"


def _bindings() -> Any:
    """The package, whose libraries come in another one under names that the loader does not look for."""
    found = importlib.util.find_spec(_LIBRARIES)
    for folder in found.submodule_search_locations or () if found else ():
        for library in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):
            for file in sorted(Path(folder).glob(f"{library}.so.*"))[-1:]:
                ctypes.CDLL(str(file))
    return importlib.import_module(_BINDINGS)


def _beside(name: str) -> ModuleType:
    """The module of that name next to this file."""
    return importlib.import_module(f".{name}" if __package__ else name, __package__)
