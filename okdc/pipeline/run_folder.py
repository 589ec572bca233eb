"""Run folders: which one a run gets, what is written there to find the student again, and the control beside it."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from okdc.errors import RunError
from okdc.pipeline import class_names
from okdc.recipe import LOADER, Recipe, runs_code
from okdc.system import files
from okdc.training import checkpoint

log = logging.getLogger("okdc")

RECIPE = "recipe.yaml"
STUDENT = "student.json"
REPORT = "report.json"
LOCK = ".lock"
LOG = "run.log"


def choose(output: Path, recipe: Recipe, experiment: str | None, resume: str | None) -> tuple[Path, Path | None]:
    """The folder of a run, and the checkpoint that it continues from.

    Without `experiment` the folder is called NETWORK-METHOD-DATA, with a number behind it when a finished run has that
    name. RunError when the folder is in use, or when there is nothing where `resume` points.
    """
    if resume not in (None, "auto"):
        last = _last(resume)
        if not last.is_file():
            raise RunError(
                f"--resume {resume}: there is no {last}. Give a run folder or its {checkpoint.LAST}, or auto."
            )
        return last.parent, last
    series = [output / experiment] if experiment else list(_series(output / default_name(recipe)))
    if resume == "auto":
        folder = series[-1] if experiment else _newest(series)
        last = folder / checkpoint.LAST
        if any(path.is_file() for path in files.history(last, 100)):
            return folder, last
        if _in_use(folder):
            raise RunError(
                f"--resume auto: {folder} holds files but no {checkpoint.LAST} to go on from. Put that back, or start "
                "another run with --experiment NAME."
            )
        return folder, None
    folder = series[-1]
    if _in_use(folder):
        state = "holds a finished run" if (folder / REPORT).is_file() else "holds an unfinished run, or other files"
        raise RunError(
            f"{folder} {state}, which is never written over. To continue it: the same command with --resume auto. "
            "To start another run: --experiment NAME."
        )
    return folder, None


def recipe_of(resume: str | None) -> Path | None:
    """The recipe of the run that `--resume PATH` points to, so that PATH alone is enough to go on."""
    if resume in (None, "auto"):
        return None
    recipe = _last(resume).with_name(RECIPE)
    return recipe if recipe.is_file() else None


def _last(resume: str) -> Path:
    return Path(resume) / checkpoint.LAST if Path(resume).is_dir() else Path(resume)


def as_begun(recipe: Recipe, folder: Path, last: Path | None) -> Recipe:
    """The recipe with photos read as the run in `folder` began, if it is continued from `last`; says what that changes.

    Runs that began before there was such a setting took them as they are stored.
    """
    student = read_student(folder) if last else None
    if student is None or recipe.data.data == LOADER:
        return recipe
    began = student["preprocess"].get("exif", False)
    if began != recipe.data.exif:
        log.warning("%s goes on as it began, with --%sexif", folder, "" if began else "no-")
    return replace(recipe, data=replace(recipe.data, exif=began))


def default_name(recipe: Recipe) -> str:
    """NETWORK-METHOD-DATA, such as resnet18-ahbf-digits."""
    parts = (recipe.network.model, recipe.method["name"], Path(recipe.data.data).name or recipe.data.data)
    words = [re.split(r"[/:]", part.rstrip("/"))[-1] for part in parts]
    return "-".join(re.sub(r"[^\w.+=]+", "_", word) for word in words)


def _series(first: Path) -> Iterator[Path]:
    """The folder, and NAME-2, NAME-3, … after it, up to the first that holds no finished run."""
    yield first
    number, folder = 2, first
    while (folder / REPORT).is_file():
        folder = first.with_name(f"{first.name}-{number}")
        number += 1
        yield folder


def _newest(series: list[Path]) -> Path:
    """The last folder of a series that has anything in it: what --resume auto goes on with."""
    return next((folder for folder in reversed(series) if _in_use(folder)), series[0])


def _in_use(folder: Path) -> bool:
    """Whether there is anything that must not be lost; what `begin` alone wrote is not."""
    if not folder.is_dir():
        return folder.exists()
    return any(path.name not in (RECIPE, STUDENT, LOG) and path.name[0] != "." for path in folder.iterdir())


def begin(folder: Path, recipe: Recipe, student: dict[str, Any], held: ExitStack) -> None:
    """Make the folder and write what was asked for and what the student is, before anything is trained.

    No other process begins there until `held` is closed, or this one ends, in whatever way: RunError. Also where a run
    that was trained there had classes of other names.
    """
    _refuse_other_classes(folder, recipe, student)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}. Choose another --output.") from error
    _lock(folder, held)
    files.atomically(folder / RECIPE, lambda path: path.write_text(recipe.to_yaml(), encoding="utf-8"))
    text = json.dumps(student, indent=2, sort_keys=True) + "\n"
    files.atomically(folder / STUDENT, lambda path: path.write_text(text, encoding="utf-8"))


def note(folder: Path, facts: dict[str, Any]) -> None:
    """Add to what is known of the student what was found out after its training."""
    text = json.dumps((read_student(folder) or {}) | facts, indent=2, sort_keys=True) + "\n"
    files.atomically(folder / STUDENT, lambda path: path.write_text(text, encoding="utf-8"))


def _refuse_other_classes(folder: Path, recipe: Recipe, student: dict[str, Any]) -> None:
    """RunError where the data has other classes than the run that is continued, or the same in another order.

    Batches of the user's own may have classes without names, which say nothing.
    """
    trained = any(path.is_file() for path in files.history(folder / checkpoint.LAST, 100))
    theirs = (read_student(folder) or {}).get("classes") if trained else None
    ours = student.get("classes")
    named = recipe.data.data != LOADER or all(class_names.known(names or ()) for names in (theirs, ours))
    if theirs and ours and theirs != ours and named:
        told = class_names.difference(theirs, ours, "the run", "the data")
        raise RunError(
            f"the classes of the data are not those that {folder} learned: {told}. Give the data it had, their folders "
            "named as they were (--class-map FILE says an order), or start another run with --experiment NAME; "
            f"--initial-checkpoint {folder / checkpoint.BEST} begins it with these weights."
        )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Nobody else trains or exports in a run folder meanwhile, RunError where one does; nothing for other folders."""
    with ExitStack() as held:
        if (folder / STUDENT).is_file():
            _lock(folder, held)
        yield


def _lock(folder: Path, held: ExitStack) -> None:
    """Keep other processes out; without effect where there are no such locks: on Windows, on some network disks."""
    try:
        import fcntl
    except ImportError:
        _remove_left(folder)  # Windows does not remove what another process has open
        return
    try:
        file = held.enter_context((folder / LOCK).open("ab+", buffering=0))
        # Not flock, which data workers would hold on to for seconds after this process was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        _remove_left(folder)
    except BlockingIOError as error:
        holder = (folder / LOCK).read_text() or "another process"
        raise RunError(
            f"{folder} is in use by {holder}. Let it finish, or end it and type this again. To work beside it: "
            "--experiment NAME for another run, --output DIR for an export."
        ) from error
    except OSError:  # of a folder that is read-only or full the first file to be written will complain
        pass


def _remove_left(folder: Path) -> None:
    """Remove what was left by a process that was killed while it wrote."""
    for left in folder.glob(f".*{files.TEMPORARY}"):
        with suppress(OSError):
            left.unlink()


def is_run(folder: Path) -> bool:
    """Whether a run began there."""
    return (folder / STUDENT).is_file()


def read_student(folder: Path) -> dict[str, Any] | None:
    """What `begin` wrote of a run's student: arch, rebuildable, classes, preprocess; None for what is not a run."""
    if not is_run(folder):
        return None
    try:
        return json.loads((folder / STUDENT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{folder / STUDENT} is damaged ({error}). Train again, or copy the run folder again."
        ) from error


def read_metrics(folder: Path) -> dict[str, Any]:
    """The student's figures (per cent) in the report of a run; empty where it has none."""
    if not (folder / REPORT).is_file():
        return {}
    try:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))["metrics"]
    except (ValueError, KeyError) as error:
        raise RunError(f"{folder / REPORT} is damaged ({error}). Copy the run folder again.") from error


def trusted(recipe: Recipe) -> list[str]:
    """The flags for what runs the user's own code, which a recipe alone may not: it was typed for the run."""
    named = {"--model": recipe.network.model, "--method": recipe.method["name"], "--teacher": recipe.cohort.teacher}
    flags = [part for flag, name in named.items() if name and runs_code(name) for part in (flag, name)]
    peers = recipe.cohort.peers
    return flags + (["--peers", ",".join(peers)] if any(map(runs_code, peers)) else [])


# Settings that say where, how fast and how carefully a run is done, not what it learns.
ASIDE = {
    "device", "timeout", "recovery_interval", "checkpoint_hist", "log", "log_interval", "torchcompile",
    "torchcompile_mode", "channels_last", "workers", "resident", "max_bad_images",
}  # fmt: skip


def find_baseline(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """The newest finished run beside `folder` of the same network on the same data and schedule with `baseline`."""
    if recipe.method["name"] == "baseline":
        return None
    mine = json.loads(json.dumps(recipe.to_dict()))
    reports = sorted(folder.parent.glob(f"*/{REPORT}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in reports:
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            theirs = facts["recipe"]
            same = all(
                theirs[section].get(key, value) == value  # a run of before may not know the setting
                for section in ("network", "data", "train")
                for key, value in mine[section].items()
                if key not in ASIDE
            )
            if theirs["method"]["name"] == "baseline" and same:
                return {"name": path.parent.name, "history": facts["history"], "metrics": facts["metrics"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a report of ours
    return None
