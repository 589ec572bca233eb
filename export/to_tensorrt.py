"""Export target `tensorrt`: model.engine for the GPU of this machine, and model.engine.json: what it is tied to.

Needs torch, numpy, tensorrt 10.12 or newer and an NVIDIA GPU. One path serves TensorRT 10 and 11: strongly typed, so
the precision is the one written in the ONNX (float32, float16, or int8 with symmetric Q/DQ nodes), and float32 means
it: no TF32. Needs tensorrt_build.py and tensorrt_engine.py beside it. On the device, without anything else of okdc:
python to_tensorrt.py model.onnx
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

FILE = "model.engine"
PRECISION = "fp32"
DESCRIPTION = "for TensorRT, on the kind of GPU that model.engine.json names"
ALSO = {"model.engine.json": "what model.engine is tied to, and built from"}
TOOL = "`python to_tensorrt.py model.onnx` builds model.engine on the machine that will run it"
BESIDE = ("tensorrt_build.py", "tensorrt_engine.py")
ASKED_BY = ("trt",)
NEEDS = ("onnx",)
PACKAGES = ("tensorrt",)
LATENCY = {"cuda_graph": True}  # how `runner` is asked for when its latency is measured

_OLDEST = (10, 12)
_INSTALL = "pip install 'tensorrt>=10.12'"


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    if importlib.util.find_spec("torch") is None:
        return "TensorRT inference needs torch: pip install torch"
    import torch

    # Before tensorrt is imported: without a device its runtime ends the process with a segmentation fault.
    if not torch.cuda.is_available():
        return (
            "TensorRT needs an NVIDIA GPU and torch sees none: copy model.onnx, to_tensorrt.py and tensorrt_*.py to "
            "the device and type there: python to_tensorrt.py model.onnx"
        )
    try:
        import tensorrt
    except ImportError as error:
        return f"TensorRT cannot be imported ({error}): {_INSTALL}"
    if _beside("tensorrt_engine").version(tensorrt.__version__) < _OLDEST:
        return f"TensorRT {tensorrt.__version__} is too old: {_INSTALL}"
    return None


def write(
    student: torch.nn.Module | None,
    example: torch.Tensor | None,
    path: str | Path,
    *,
    onnx: str | Path | None = None,
    profile: tuple[int, int, int] = (1, 8, 32),
    workspace: int = 4 << 30,
    timing_cache: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the engine of the ONNX file `onnx`, from which alone it is built, and its sidecar; say what was built.

    The precision is the graph's; a `path` such as model.fp16.engine promises it, and an engine without it is refused.
    `profile`: smallest, best and largest batch; `workspace`: bytes that a layer may use; `timing_cache`: file that
    makes the next build fast, in the user's cache by default; `device`: the GPU that it is for, the first for "cpu".
    Raises RuntimeError when TensorRT is not available, refuses the graph, or builds it in another precision than asked.
    """
    trt = _tensorrt()
    if onnx is None:
        raise RuntimeError("An engine is built from ONNX: give onnx=path of a model.onnx, or export with --onnx too.")
    import torch

    started, path, source, shared = time.perf_counter(), Path(path), Path(onnx), _beside("tensorrt_engine")
    gpu = shared.gpu_of(device)
    here = _here(trt, gpu)
    with torch.cuda.device(gpu):  # TensorRT builds for the GPU that is current
        cache = Path(timing_cache or _default_cache(here))
        plan, asked, shapes = _beside("tensorrt_build").build(trt, source, profile, workspace, cache)
        built = shared.built_precisions(trt, plan)
    _check_precisions(asked | shared.promised(path), built)
    told = shared.write(path, plan, source, {**here, "profile": shapes, "precisions": built})
    seconds = round(time.perf_counter() - started, 2)
    return {"path": "tensorrt", "dynamic_batch": True, "bytes": len(plan), "seconds": seconds, **told}


def runner(
    path: str | Path, device: str = "cpu", threads: int | None = None, *, cuda_graph: bool = False
) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32 on TensorRT; `.provider` says so, `.infer` takes tensors.

    `.precisions` counts the engine's layers by number type, `.device` is the GPU: an engine always runs on one, the
    first where `device` is "cpu". `cuda_graph` replays one captured graph per shape. Raises RuntimeError with the
    command that rebuilds when the engine is of another TensorRT or another GPU.
    """
    trt, shared, path = _tensorrt(), _beside("tensorrt_engine"), Path(path)
    gpu = shared.gpu_of(device)
    plan = _read_engine(path, _here(trt, gpu))
    return shared.Engine(trt, path, plan, gpu, _rebuild(path.with_suffix(".onnx")), cuda_graph)


def _tensorrt() -> Any:
    """The tensorrt package, or RuntimeError with the reason why not."""
    reason = available()
    if reason:
        raise RuntimeError(reason)
    import tensorrt

    return tensorrt


def _here(trt: Any, gpu: torch.device) -> dict[str, Any]:
    """What an engine for this GPU of this machine is tied to."""
    import torch

    capability = ".".join(str(number) for number in torch.cuda.get_device_capability(gpu))
    name = torch.cuda.get_device_name(gpu)
    return {"tensorrt": trt.__version__, "cuda": torch.version.cuda, "gpu": name, "compute_capability": capability}


def _default_cache(here: dict[str, Any]) -> Path:
    """One file per TensorRT and kind of GPU, as timings of another are of no use."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "okdc"
    return folder / f"tensorrt-{here['tensorrt']}-sm{here['compute_capability']}.timing"


def _check_precisions(asked: set[str], built: dict[str, int]) -> None:
    """fp32 is everywhere (inputs, logits, scales); what counts is which cheaper types are there."""
    if not built:
        raise RuntimeError("The inspector names no precision for any layer of the engine, so it cannot be trusted.")
    wanted, found = asked - {"fp32"}, set(built) - {"fp32"}
    if wanted != found:
        names = [", ".join(sorted(types)) or "fp32" for types in (wanted, found)]
        raise RuntimeError(f"The ONNX asks for {names[0]} layers, and TensorRT built an engine with {names[1]} layers.")


def _read_engine(path: Path, here: dict[str, Any]) -> bytes:
    """The engine's bytes, if its sidecar says that it belongs to this machine and to the ONNX beside it."""
    tied = {key: here[key] for key in ("tensorrt", "compute_capability", "gpu")}
    return _beside("tensorrt_engine").read(path, tied, _rebuild)


def _rebuild(source: Path) -> str:
    return f"Build it here: python {Path(__file__)} {source}"


def _batches(path: Path) -> tuple[int, int, int]:
    """The batches of the engine that is built anew: a server may have been promised them."""
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        told = json.loads(_beside("tensorrt_engine").sidecar(path).read_text())
        ((smallest, usual, largest),) = told["profile"].values()
        return smallest[0], usual[0], largest[0]
    return 1, 8, 32


def _settle(path: Path) -> None:
    """In a bundle: Triton's copy of the engine, and the check sums of what is this machine's own from now on."""
    bundle = path.parent
    shared = _beside("tensorrt_engine")
    served = [*bundle.glob("triton/*_tensorrt/1/model.plan")] if path.name == "model.engine" else []
    for plan in served:
        shared.write_bytes(plan, path.read_bytes())
    sums = bundle / "SHA256SUMS"
    if sums.is_file():
        files = {file.relative_to(bundle).as_posix(): file for file in (path, shared.sidecar(path), *served)}
        kept = [line for line in sums.read_text().splitlines() if line.partition("  ")[2] not in files]
        new = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {name}" for name, file in files.items()]
        shared.write_bytes(sums, "".join(f"{line}\n" for line in [*kept, *new]).encode())


def _beside(name: str) -> ModuleType:
    """The module of that name next to this file."""
    try:
        return importlib.import_module(f".{name}" if __package__ else name, __package__)
    except ModuleNotFoundError as error:  # somebody copied one file where three belong together
        needs = f"{Path(__file__).name} needs {name}.py beside it"
        raise RuntimeError(f"{needs}: copy that from the bundle, too.") from error


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python to_tensorrt.py model.onnx", file=sys.stderr)
        sys.exit(2)
    try:
        engine = Path(sys.argv[1]).with_suffix(".engine")
        print(json.dumps(write(None, None, engine, onnx=sys.argv[1], profile=_batches(engine)), indent=2))
        _settle(engine)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
