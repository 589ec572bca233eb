"""The memory of this machine, or of the part of it that a container has."""

from __future__ import annotations

import os
from pathlib import Path

# What a container may have: cgroup v2, then v1. Where nothing limits it, "max" or a number larger than the machine's.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total() -> int | None:
    """Bytes that there are for all processes together; None where the system does not say it."""
    try:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    for path in _LIMITS:
        text = path.read_text().strip() if path.is_file() else ""
        found += [int(text)] if text.isdigit() else []
    return min(found)


def free() -> int | None:
    """Bytes that can be had now without pushing anything out; None where the system does not say it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return None
