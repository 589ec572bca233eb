"""How much of this machine other programs use while something is timed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

_ALL = Path("/proc/stat")  # Linux alone has it


class Others:
    """A context manager: `cores` is how many cores other programs used meanwhile; 0 where nobody knows that."""

    def __init__(self) -> None:
        self.cores = 0.0

    def __enter__(self) -> Others:
        self._began = time.perf_counter(), time.process_time(), _used()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        began, own, used = self._began
        taken = time.perf_counter() - began
        if used is not None and (now := _used()) is not None and taken:
            self.cores = max(0.0, (now - used - (time.process_time() - own)) / taken)


def _used() -> float | None:
    """Seconds that all cores together have worked since the machine was started."""
    try:
        user, nice, system, _, _, *interrupts = map(int, _ALL.read_text().splitlines()[0].split()[1:8])
    except (OSError, ValueError, IndexError):
        return None
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
