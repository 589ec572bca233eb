"""The memory of this machine, or of the part of it that a container has."""

from __future__ import annotations

import os
from pathlib import Path

# Of a container, cgroup v2, then v1: what it may have, what it has, and which of that is given back for the asking.
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def total() -> int | None:
    """Bytes that there are for all processes together; None where the system does not say it."""
    try:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    limits = (_number(folder / limit) for folder, limit, *_ in _GROUPS)
    return min(found + [limit for limit in limits if limit is not None])


def free() -> int | None:
    """Bytes that can be had now without pushing anything out; None where the system does not say it."""
    found = [1024 * kilobytes for kilobytes in _listed(Path("/proc/meminfo"), "MemAvailable:")]
    for folder, limit, used, cached in _GROUPS:
        may, has = _number(folder / limit), _number(folder / used)
        if may is not None and has is not None:
            found.append(max(0, may - has + sum(_listed(folder / "memory.stat", cached))))
    return min(found, default=None)


def _number(path: Path) -> int | None:
    """What the file says; None where there is none, or no number, as where nothing limits it."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _listed(path: Path, name: str) -> list[int]:
    """The number behind that name in a list, if there is one."""
    lines = (line.split() for line in path.read_text().splitlines()) if path.is_file() else ()
    return [int(line[1]) for line in lines if line[:1] == [name]]
