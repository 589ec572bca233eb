"""What a command tells whoever waits for it: lines on stderr, unless it is to be quiet, and in a run's log, timed."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

_RECENT = 200  # lines that are kept for a log that has not been opened yet
_WARNING = "warning: "  # how a line of the log begins, after the time, that is one

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
    """Append to the log `path` what is said and warned of, and the error that ends it; a log that is open stays.

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
    try:
        _log.write("".join(f"{line}\n" for line in _waiting))
        _waiting.clear()
        yield
    except BaseException as error:
        record(f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        _log.close()
        _log = None


def warnings_in(log: Path) -> list[str]:
    """The warnings of okdc in a log, each once, in their order; none where there is no log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return list(dict.fromkeys(re.findall(rf"^\S+ \S+  {_WARNING}(.+)$", text, flags=re.MULTILINE)))


def _recorded(entry: logging.LogRecord) -> bool:
    """Records warnings, each as one line. A filter, not a handler: with one of those Python would not print them by
    itself. From the beginning: data is read before a run has its log."""
    if entry.levelno >= logging.WARNING:
        record(_WARNING + " ".join(entry.getMessage().split()))
    return True


logging.getLogger("okdc").addFilter(_recorded)
