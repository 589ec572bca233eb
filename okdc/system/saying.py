"""What a command tells whoever waits for it: lines on stderr, unless it is to be quiet, and in a run's log, timed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

_RECENT = 200  # lines that are kept for a log that has not been opened yet

quiet = False
_log: TextIO | None = None
_waiting: list[str] = []


def say(text: str, always: bool = False) -> None:
    """Print a line on stderr, unless quiet, or `always`, and record it."""
    if always or not quiet:
        print(text, file=sys.stderr, flush=True)
    record(text)


@contextmanager
def less(wish: bool) -> Iterator[None]:
    """Meanwhile `say` prints nothing, if that is the wish."""
    global quiet
    before, quiet = quiet, wish
    try:
        yield
    finally:
        quiet = before


def record(text: str) -> None:
    """Write text to the log, each line with the time; it waits until there is one."""
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    lines = [f"{now}  {line}".rstrip() for line in text.splitlines()]
    if _log is None:
        _waiting.extend(lines)
        del _waiting[:-_RECENT]
        return
    _log.write("".join(f"{line}\n" for line in lines))
    _log.flush()


def is_logged() -> bool:
    """Whether there is a log now."""
    return _log is not None


def forget() -> None:
    """Drop what waits for a log: another run begins."""
    _waiting.clear()


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Append to the log `path` what is said, warnings of okdc, and the error that ends it; a log that is open stays.

    A folder that is full or read-only costs the log alone.
    """
    global _log
    if _log is not None:
        yield
        return
    try:
        _log = path.open("a", encoding="utf-8")
    except OSError:
        yield
        return
    logging.getLogger("okdc").addFilter(_recorded)
    try:
        _log.write("".join(f"{line}\n" for line in _waiting))
        _waiting.clear()
        yield
    except BaseException as error:
        record(f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        logging.getLogger("okdc").removeFilter(_recorded)
        _log.close()
        _log = None


def _recorded(entry: logging.LogRecord) -> bool:
    """Records warnings. A filter, not a handler: with one of those Python would not print them by itself."""
    if entry.levelno >= logging.WARNING:
        record(entry.getMessage())
    return True
