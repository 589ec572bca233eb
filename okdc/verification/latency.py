"""How long one runner takes: the clock that `alone` loads in the process of each; it must not import torch or okdc."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
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
    """Wall and CPU time (s) of each call; `run` has a `process_time` of its own where another process works for it."""
    wall: list[float] = []
    cpu: list[float] = []
    process_time = getattr(run, "process_time", time.process_time)
    collecting = gc.isenabled()
    gc.disable()
    try:
        total = 0.0
        while (len(wall) < SAMPLES or total < SECONDS) and total < LIMIT:
            cpu_start, start = process_time(), time.perf_counter()
            run(images)
            wall.append(time.perf_counter() - start)
            cpu.append(process_time() - cpu_start)
            total += wall[-1]
    finally:
        if collecting:
            gc.enable()
    return wall, cpu
