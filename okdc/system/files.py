"""Files that are never half written: atomic replacement, and the earlier ones that are kept beside."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from okdc.errors import RunError
from okdc.system.waiting import worker_died

TEMPORARY = ".tmp"


def duplicate(source: Path, path: Path, keep: int = 1) -> None:
    """Make `path` the same file as `source`, atomically: a hard link, or a copy where the disk knows no links."""

    def link(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    atomically(path, link, keep)


def atomically(path: Path, write: Callable[[Path], object], keep: int = 1) -> None:
    """Let `write` fill a temporary file beside `path`, then give it that name, so that `path` is never half written.

    RunError when the disk is full or read-only; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    files = history(path, keep)
    try:
        write(temporary)
        for newer, older in reversed(list(pairwise(files))):
            if newer.exists():
                duplicate(newer, older)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if worker_died(error):
            raise
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        before = "The file that was there is unharmed; f" if path.exists() else "F"
        raise RunError(
            f"could not write {path}: {reason}. {before}ree some space or choose another --output, then continue "
            f"with --resume auto"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def history(path: Path, keep: int) -> list[Path]:
    """The files that `save` keeps, newest first: last.pth.tar, last.1.pth.tar, last.2.pth.tar, ..."""
    name, _, suffix = path.name.partition(".")
    return [path, *(path.with_name(f"{name}.{i}.{suffix}") for i in range(1, keep))]


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
