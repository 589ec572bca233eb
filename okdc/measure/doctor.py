"""What this machine has for training and deploying, and what to type where something is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import okdc
from okdc.deploy import runtimes
from okdc.errors import counted
from okdc.system import shipped

GIB = 2**30
LITTLE_SHARED, LITTLE_DISK = 1.0, 5.0  # GiB: below, data workers, or a run's checkpoints, may find no room
# Loads each provider of onnxruntime in a process of its own: one that lacks a library may end it, or write on stderr.
_PROVIDERS = """
import json, onnx, onnxruntime
from onnx import TensorProto, helper
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
if hasattr(onnxruntime, "preload_dlls"):
    onnxruntime.preload_dlls()
found = {}
for name in onnxruntime.get_available_providers():
    try:
        found[name] = name in onnxruntime.InferenceSession(model, providers=[name]).get_providers()
    except Exception:
        found[name] = False
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what is there, whether that is well (None: it is not needed here), what to do."""

    name: str
    found: str
    ok: bool | None
    advice: str = ""


def examine() -> list[Finding]:
    """Everything that training, export and verification can use here; nothing is installed or changed."""
    gpu = torch.cuda.is_available()
    parts = (_software(), _gpus(gpu), _runtimes(gpu), _compilers(gpu), _room())
    return [finding for part in parts for finding in part]


def _software() -> Iterator[Finding]:
    yield Finding("okdc", f"{okdc.__version__}, Python {platform.python_version()}, {platform.platform()}", True)
    for name in ("torch", "torchvision", "timm", "onnx"):
        yield Finding(name, _version(name) or "not installed", _version(name) is not None)


def _gpus(gpu: bool) -> Iterator[Finding]:
    built = torch.version.cuda
    yield Finding("CUDA of torch", built or "none, torch is built for the CPU", bool(built) or None)
    driver = _driver()
    if gpu:
        yield Finding("driver", driver or "unknown", True)
        yield Finding("cuDNN", str(torch.backends.cudnn.version()), True)
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            text = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, compute {facts.major}.{facts.minor}"
            yield Finding(f"GPU {index}", text, True)
    elif driver and not built:
        advice = "This torch cannot use the GPU: install the build for CUDA that pytorch.org names for your system."
        yield Finding("GPU", f"a driver, {driver}, but a torch without CUDA", False, advice)
    elif driver:
        advice = "Update NVIDIA's driver, or install a torch for an older CUDA. In a container: docker run --gpus all."
        yield Finding("GPU", f"a driver, {driver}, which this torch cannot use", False, advice)
    else:
        yield Finding("GPU", "none; training and export run on the CPU", None)


def _driver() -> str | None:
    """The version of NVIDIA's driver, where there is one."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip().splitlines()[0] if told.returncode == 0 and told.stdout.strip() else None


def _runtimes(gpu: bool) -> Iterator[Finding]:
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(both) == 2:
        advice = "They overwrite each other: pip uninstall onnxruntime onnxruntime-gpu, then install one of them again."
        yield Finding("onnxruntime", "onnxruntime and onnxruntime-gpu are both installed", False, advice)
    elif not both:
        yield Finding("onnxruntime", "not installed", False, "pip install onnxruntime-gpu, or onnxruntime.")
    else:
        yield from _providers(both[0], gpu)
    found = _version("tensorrt")
    advice = "For its files and rows: pip install 'okdc[tensorrt]'." if gpu and not found else ""
    yield Finding("tensorrt", found or "not installed", True if gpu and found else None, advice)
    yield _rtx()
    yield from _others()


def _others() -> Iterator[Finding]:
    """The runtimes that --runtimes knows, by the names that it knows them by."""
    for name, runtime in runtimes.known().items():
        found, _, advice = (runtime.module.available() or "").partition(": ")
        here = f"{_version(name) or 'here'}, for --runtimes {name}"
        yield Finding(name, found or here, None if found else True, advice)


def _rtx() -> Finding:
    """TensorRT for RTX: whether its engines can be built, for which no GPU is needed, and run."""
    name, packages = "TensorRT for RTX", ("tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13")
    builder, runtime = (
        shipped.load(shipped.folder("export") / f) for f in ("to_tensorrt_rtx.py", "run_onnxruntime_rtx.py")
    )
    if not any(map(_version, packages)):
        return Finding(name, "not installed", None, "For engines of RTX GPUs, built anywhere: pip install 'okdc[rtx]'.")
    if reason := builder.available():
        return Finding(name, reason.partition(": pip ")[0], False, f"pip {reason.partition(': pip ')[2]}")
    runs = "no GPU that runs them is here" if runtime.available() else "and runs them on the GPU here"
    return Finding(name, f"{_version(packages[0])}, builds engines for RTX GPUs; {runs}", True)


def _providers(package: str, gpu: bool) -> Iterator[Finding]:
    told = subprocess.run([sys.executable, "-c", _PROVIDERS], capture_output=True, text=True)
    name = f"{package} {_version(package)}"
    if told.returncode:
        reason = (told.stderr.strip().splitlines() or [f"exit code {told.returncode}"])[-1]
        advice = f"pip install --force-reinstall {package}"
        yield Finding(package, f"{name}, which does not start: {reason}", False, advice)
        return
    loads: dict[str, bool] = json.loads(told.stdout.strip().splitlines()[-1])
    yield Finding(package, f"{name}, providers that load: {', '.join(p for p in loads if loads[p]) or 'none'}", True)
    for provider in (each for each, loaded in loads.items() if not loaded):
        kind = provider.removesuffix("ExecutionProvider")
        reason = next((line for line in told.stderr.splitlines() if kind in line), "")
        text = f"does not load{': ' + reason.strip() if gpu and reason else ''}"
        advice = "Install the CUDA and cuDNN that it names: pip install 'onnxruntime-gpu[cuda,cudnn]'." if gpu else ""
        yield Finding(provider, text if gpu else f"{text}; there is no GPU", False if gpu else None, advice)


def _compilers(gpu: bool) -> Iterator[Finding]:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "cl"))), None)
    advice = "" if compiler else "--torchcompile on the CPU needs one: apt-get install g++, or your system's way."
    yield Finding("C++ compiler", compiler or "none", True if compiler else None, advice)
    if gpu:
        triton = _version("triton")
        yield Finding("triton", triton or "not installed", bool(triton), "" if triton else "--torchcompile needs it.")


def _room() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    advice = "" if threads <= cores else f"More threads than cores wait for each other: export OMP_NUM_THREADS={cores}"
    yield Finding(
        "processor",
        f"{counted(cores, 'core')} for this process, {counted(threads, 'thread')} of torch",
        threads <= cores,
        advice,
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / GIB
        advice = "Data workers need it: docker run --shm-size=8g, or -j 0." if free < LITTLE_SHARED else ""
        yield Finding("shared memory", f"{free:.1f} GiB free", free >= LITTLE_SHARED, advice)
    free = shutil.disk_usage(Path.cwd()).free / GIB
    advice = "Runs keep several checkpoints: --output on a larger disk." if free < LITTLE_DISK else ""
    yield Finding("disk", f"{free:.0f} GiB free here", free >= LITTLE_DISK, advice)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings as plain values, for a report of a fault."""
    return [vars(finding) for finding in findings]
