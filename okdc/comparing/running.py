"""The runs of a comparison: each an ordinary one in a process of its own, never done twice, its failure told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from okdc.errors import OkdcError, RunError
from okdc.pipeline import run_folder
from okdc.recipe import Recipe, load
from okdc.system import files, saying

RECIPES, LOGS = "recipes", "logs"
# What a run is started with: okdc itself, which ends, its state saved, when the comparison is gone.
_START = (
    "import sys; from okdc.system.signals import end_with_parent; end_with_parent(); sys.argv[0] = 'okdc'; "
    "from okdc.cli import main; main()"
)


@dataclass(frozen=True)
class Job:
    """One run: its folder and what it is asked to do."""

    folder: Path
    recipe: Recipe
    cost: float  # of an epoch, plain ones, so that the time that is left can be told

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.folder.parent / LOGS / f"{self.folder.name}.log"

    def facts(self) -> dict[str, Any] | None:
        """What its report says; None where it is not done. RunError for a damaged one."""
        report = self.folder / run_folder.REPORT
        if not report.is_file():
            return None
        try:
            return json.loads(report.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{report} is damaged ({error}). Remove {self.folder}: its run is done again.") from error

    def warnings(self) -> list[str]:
        """What it warned of, also where it is not done."""
        return saying.warnings_in(self.folder / run_folder.LOG)


Done = Callable[[Job, str | None], None]  # a job that has ended, and why it failed
InProcess = Callable[[Job], object]


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The same recipe with another seed."""
    return replace(recipe, train=replace(recipe.train, seed=seed))


def refuse_others(jobs: Sequence[Job]) -> None:
    """RunError where a folder holds a run of other settings than its job's: figures of two kinds make no table."""
    for job in jobs:
        file = job.folder / run_folder.RECIPE
        if not file.is_file():
            continue
        mine, theirs = job.recipe.to_dict(), load(file, typed=None).to_dict()
        differing = [
            f"{section}.{key} was {theirs[section].get(key)!r} and is {value!r}"
            for section in ("network", "cohort", "method", "data", "train")
            for key, value in json.loads(json.dumps(mine[section])).items()
            if key not in run_folder.ASIDE and theirs[section].get(key, value) != value
        ]
        if differing:
            raise RunError(
                f"{job.folder} holds a run of other settings: {'; '.join(differing[:3])}. Give the settings it had, or "
                "compare in another folder: --experiment NAME."
            )


def run_all(jobs: Sequence[Job], at_once: int, done: Done, in_process: InProcess | None = None) -> dict[Path, str]:
    """Run what is not done yet, so many at a time, and say why runs failed, by folder.

    Each in a process of its own, or by `in_process` one after another in this one. A run that was interrupted goes on
    where it was. When this process is told to end, its runs save and end too.
    """
    waiting = [job for job in jobs if job.facts() is None]
    if in_process is not None:
        return _one_after_another(waiting, in_process, done)
    failed: dict[Path, str] = {}
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running.append((job, _start(job, at_once)))
            time.sleep(0.2)
            for job, process in [each for each in running if each[1].poll() is not None]:
                running.remove((job, process))
                reason = None if process.returncode == 0 else _reason(job, process.returncode)
                if reason:
                    failed[job.folder] = reason
                done(job, reason)
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()
    return failed


def _one_after_another(jobs: Sequence[Job], run: InProcess, done: Done) -> dict[Path, str]:
    failed: dict[Path, str] = {}
    for job in jobs:
        try:
            run(job)
        except OkdcError as error:
            failed[job.folder] = str(error)
        done(job, failed.get(job.folder))
    return failed


def _start(job: Job, at_once: int) -> subprocess.Popen[bytes]:
    place = job.folder.parent
    recipe = place / RECIPES / f"{job.folder.name}.yaml"
    for folder in (recipe.parent, job.log.parent):
        folder.mkdir(parents=True, exist_ok=True)
    files.atomically(recipe, lambda path: path.write_text(job.recipe.to_yaml(), encoding="utf-8"))
    command = [sys.executable, "-c", _START, "compress", "--recipe", str(recipe), "--output", str(place)]
    command += ["--experiment", job.folder.name, "--resume", "auto", *run_folder.trusted(job.recipe)]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))} if at_once > 1 else {}
    with job.log.open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=threads | os.environ)


def _reason(job: Job, code: int) -> str:
    """Why a run failed, in its own words where it said some."""
    text = job.log.read_text(encoding="utf-8", errors="replace") if job.log.is_file() else ""
    told = re.findall(r"^okdc: error: (.+(?:\n  .+)*)", text, flags=re.MULTILINE)
    if told:
        return " ".join(told[-1].split())
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}, which is how a system ends what takes too much memory"
    last = text.strip().splitlines()[-1:] or ["it said nothing"]
    return f"exit code {code}: {last[0]} ({job.log})"
