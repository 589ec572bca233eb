"""CPU seconds and peak memory of a piece of work, each in a process of its own, and tables of them."""

from __future__ import annotations

import os
import resource
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """CPU seconds (the median), and by how many megabytes the process was larger meanwhile than before."""

    seconds: float
    megabytes: float


def cost(work: Callable[[], Any], n: int = 3) -> Cost:
    """What `work` costs, in a forked process, so that memory is its own; its children's CPU time counts."""
    receive, send = get_context("fork").Pipe(duplex=False)
    if not (child := os.fork()):
        try:
            send.send(_measured(work, n))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        raise RuntimeError("the measured process died: see what it wrote above") from None
    finally:
        os.waitpid(child, 0)
    return Cost(*found)


def _measured(work: Callable[[], Any], n: int) -> tuple[float, float]:
    before = peak = _megabytes()
    done, times = threading.Event(), []

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, _megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(n):
        start = cpu_seconds()
        work()
        times.append(cpu_seconds() - start)
    done.set()
    watcher.join()
    return statistics.median(times), peak - before


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _megabytes() -> float:
    """What the process holds of its own: not what is mapped from files, which the system may take back."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table in Markdown, row by row."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head), flush=True)
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print()
