"""How long one runner takes. Also a script (JSON in, JSON out), so that every backend is timed in a process of its own.

Backends that spin their threads slow each other down by up to three times when they share a process.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from okdc.verification.schema import Latency

WARM_UP = 0.5  # seconds; caches, clocks and lazily built kernels need time, not a number of calls
SAMPLES = 30  # at least
SECONDS = 0.5  # and for at least this long, so that the percentiles of a fast network mean something
LIMIT = 20.0  # seconds of sampling after which a slow network is left at fewer samples


def measure(
    run: Callable[[np.ndarray], Any], images: np.ndarray, batch_sizes: Sequence[int], threads: int | None = None
) -> list[Latency]:
    """One row per batch size: percentiles and CPU time (ms), images per second, samples, whether others were busy.

    images: (B, C, H, W), B at least the largest batch size; threads: what `run` may use on a CPU, None elsewhere.
    """
    return [_measure_batch(run, np.ascontiguousarray(images[:batch]), threads) for batch in batch_sizes]


def _measure_batch(run: Callable[[np.ndarray], Any], images: np.ndarray, threads: int | None) -> Latency:
    run(images)  # may compile, or capture a graph, for as long as a whole warm-up
    start = time.perf_counter()
    while time.perf_counter() - start < WARM_UP:
        run(images)
    wall, cpu = _sample(run, images)
    p50, p90, p95, p99 = (float(np.percentile(wall, q)) * 1e3 for q in (50, 90, 95, 99))
    cpu_p50 = float(np.median(cpu)) * 1e3
    return {
        "batch": len(images),
        "p50_ms": p50,
        "p90_ms": p90,
        "p95_ms": p95,
        "p99_ms": p99,
        "images_per_second": len(images) * len(wall) / sum(wall),
        "cpu_ms": cpu_p50,
        "samples": len(wall),
        # With one thread both clocks agree unless somebody else had the core; with more, nothing can be said.
        "contended": p50 > 1.15 * cpu_p50 if threads == 1 else None,
    }


def _sample(run: Callable[[np.ndarray], Any], images: np.ndarray) -> tuple[list[float], list[float]]:
    """Wall and CPU time (s) of each call."""
    wall: list[float] = []
    cpu: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        total = 0.0
        while (len(wall) < SAMPLES or total < SECONDS) and total < LIMIT:
            cpu_start, start = time.process_time(), time.perf_counter()
            run(images)
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
            total += wall[-1]
    finally:
        if collecting:
            gc.enable()
    return wall, cpu


def measure_alone(
    module: str,
    file: Path,
    device: str,
    images: np.ndarray,
    batch_sizes: Sequence[int],
    threads: int,
    options: dict[str, Any] | None = None,
) -> list[Latency]:
    """`measure` of the runner in `module` in a process of its own.

    module: the file of an export target, which is no part of any package, or the name of a module that can be imported.

    options: further keywords of the runner; when not given, those in the module's LATENCY, where it has that. Raises
    RuntimeError with the last line of what that process said when it failed.
    """
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # read when the libraries are loaded
    environment = os.environ | dict.fromkeys(variables, str(threads))
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "images.npy"
        np.save(saved, images, allow_pickle=False)
        paths = {"module": module, "file": str(file), "images": str(saved)}
        job = paths | {"device": device, "threads": threads, "batch_sizes": list(batch_sizes), "options": options}
        # -P: the script's own folder holds modules whose names must not shadow other people's.
        command = [sys.executable, "-P", str(Path(__file__).resolve())]
        text = json.dumps(job)
        done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Time what the job on stdin names, and print the latency rows as one line of JSON."""
    job = json.load(sys.stdin)
    module = _loaded(job["module"])
    options = getattr(module, "LATENCY", {}) if job["options"] is None else job["options"]
    run = module.runner(Path(job["file"]), device=job["device"], threads=job["threads"], **options)
    images = np.load(job["images"], allow_pickle=False)
    print(json.dumps(measure(run, images, job["batch_sizes"], job["threads"] if job["device"] == "cpu" else None)))


def _loaded(module: str) -> ModuleType:
    if not module.endswith(".py"):
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location("export_target", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    main()
