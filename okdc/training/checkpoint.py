"""Checkpoints in timm's layout: written whole or not at all, read without running any code that is in them."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from okdc.errors import RunError, first_line
from okdc.ranks import first
from okdc.system.files import atomically, duplicate, history

LAST = "last.pth.tar"
BEST = "model_best.pth.tar"
ZIP = b"PK\x03\x04"  # what torch.save writes begins with

log = logging.getLogger("okdc")


def save(path: Path, payload: dict[str, Any], keep: int = 1) -> None:
    """Write `payload` to `path` atomically, keeping `keep - 1` earlier files beside it (see `history`).

    RunError when it cannot be written, or could not be read again without running code; `path` is then as it was.
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        _check_readable(temporary, path)

    atomically(path, write, keep)


class UnusableError(RunError):
    """A checkpoint that is missing, damaged or foreign, in whose place another may stand."""


def load(path: Path | str, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU with `weights_only`; `mapped`, its tensors only when they are looked at.

    What is mapped must be copied soon: the file takes its place on the disk for as long, also when it is replaced.
    UnusableError when it is missing, damaged, foreign or holds code; RunError when the system cannot read it now.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UnusableError(f"there is no checkpoint {path}. It is a folder: give {path / LAST}.")
    try:
        mapped = mapped and os.name == "posix" and _is_zip(path)  # Windows replaces no file that is mapped
        payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch tells damage by half a dozen types
        raise _refusal(path, error) from error
    if not isinstance(payload, dict) or "state_dict" not in payload:
        raise UnusableError(f"{path} is not a checkpoint: it has no 'state_dict'. Give the {LAST} or {BEST} of a run.")
    return payload


def load_run(path: Path | str) -> dict[str, Any]:
    """Map a checkpoint that a run can continue from; in place of a damaged or foreign one the newest good one that was
    kept beside it, loudly. That takes the bad one's name too, so that the next save does not push it out instead.

    Of several ranks the first chooses, so that all continue from the same one.
    """
    path, read = Path(path), []

    def choose() -> Path:
        chosen, payload = _newest_good(path)
        read.append(payload)
        return chosen

    chosen = first(choose)
    return read[0] if read else _load_state(chosen)


def _newest_good(path: Path) -> tuple[Path, dict[str, Any]]:
    try:
        return path, _load_state(path)
    except UnusableError as error:
        kept = [*history(path, 100)[1:], *([path.with_name(BEST)] if path.name == LAST else [])]
        for other in kept:
            try:
                payload = _load_state(other)
            except UnusableError:
                continue
            log.warning("%s\nContinuing from the one kept before it, %s, which takes its place.", error, other)
            duplicate(other, path)
            return other, payload
        raise


def _load_state(path: Path) -> dict[str, Any]:
    payload = load(path, mapped=True)
    if "okdc" not in payload:
        raise UnusableError(
            f"{path} holds weights but no okdc training state, so a run cannot continue from it. "
            f"To start a new run from its weights: --initial-checkpoint {path}"
        )
    return payload


def student_weights(payload: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that ship, under the target's own keys: the moving average where there is one, as for timm."""
    return payload.get("state_dict_ema") or payload["state_dict"]


def difference(saved: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first ways in which two state dicts do not fit one another, in words, or None when they fit."""
    found = [f"{key} is missing from the checkpoint" for key in here if key not in saved]
    found += [f"{key} is only in the checkpoint" for key in saved if key not in here]
    found += [
        f"{key} is {tuple(saved[key].shape)} in the checkpoint and {tuple(value.shape)} here"
        for key, value in here.items()
        if isinstance(value, Tensor) and isinstance(saved.get(key), Tensor) and saved[key].shape != value.shape
    ]
    if not found:
        return None
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def _check_readable(temporary: Path, path: Path) -> None:
    # Better to fail at the first save than at the resume in hour nine.
    if unsafe := get_unsafe_globals_in_checkpoint(str(temporary)):
        raise RunError(
            f"{path} was not written: the state of the run holds {', '.join(sorted(unsafe))}, which could not be read "
            "back safely. Let get_extra_state and the recipe hold only tensors, numbers, strings, lists and dicts."
        )


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(ZIP)) == ZIP


def _refusal(path: Path, error: Exception) -> RunError:
    """What to tell a person when `torch.load` raised `error`."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return UnusableError(f"there is no checkpoint {path}. okdc writes {LAST} into the folder of a run.")
    reason = None
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a file cut short torch asks what is before it
        reason = error.strerror
    elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        reason = "there is not enough memory"
    if reason is None:
        return UnusableError(_why_not(path, error))
    return RunError(
        f"{path} cannot be read: {reason}. It may well be whole, so nothing stands in for it. See to its permissions, "
        "its disk and the memory that is free, then type this again, or give another checkpoint of the run."
    )


def _why_not(path: Path, error: Exception) -> str:
    """Why the file is not one to load, for a person."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(ZIP))
    if start == ZIP:
        try:
            unsafe = sorted(get_unsafe_globals_in_checkpoint(str(path)))
        except Exception:
            unsafe = []
        if unsafe:
            return (
                f"{path} was not loaded: it holds {', '.join(unsafe)}, which could run code. A checkpoint of okdc "
                f"never does; give the {LAST} of a run."
            )
        return (
            f"{path} is damaged or cut short ({size:,} bytes): {first_line(error)}. Copy it again, give "
            "another checkpoint of the run, or start anew without --resume."
        )
    kind = "is empty" if not size else f"is not a file that torch.save wrote (it begins with {start!r})"
    return f"{path} {kind}, and was not loaded. Give the {LAST} or {BEST} of a run."
