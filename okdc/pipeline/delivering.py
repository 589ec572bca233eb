"""The end of a run: its student exported and verified, by-products too, and the report on all of it."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from okdc import deploy, report
from okdc.pipeline import byproducts, examples, run_folder
from okdc.pipeline.facts import facts_of
from okdc.pipeline.result import Result
from okdc.system.saying import say
from okdc.system.signals import stopping
from okdc.training import checkpoint, loggers


def deliver(result: Result, training: dict[str, Any], lost: str | None, logs: loggers.Loggers, go_on: str) -> None:
    """Export and verify what was trained, by-products too (`lost` says why there are none), and report on the run.

    SystemExit with 129, 130 or 143 after SIGHUP, Ctrl-C or SIGTERM, the report written; `go_on` is what to type then.
    """
    folder, further = result.path, list[dict[str, Any]]()
    try:
        if deploy.asked(result.recipe.export):
            with stopping(lambda: say(_stopped(folder, go_on), always=True)):
                result.verification = result.bundle(result.recipe.export)
                further = _byproducts(result, lost)
    except deploy.UnfitError as error:
        result.verification = error.verification
        raise
    finally:  # a run that is trained has a report, also when its export failed: it says why
        shown = {"examples": examples.of(result), "pictured": examples.pictured(result), "byproducts": further}
        report.write(folder, facts_of(result, training) | shown)
        logs.end(result.metrics, result.verification["verdict"] if result.verification else None)
    if result.verification and not deploy.is_known(result.data.preprocess):
        say(f"{folder / 'export'}: {deploy.UNKNOWN}")


def _byproducts(result: Result, lost: str | None) -> list[dict[str, Any]]:
    """Rows of the by-products, which are exported, and of the student beside them; none where there are none."""
    data, settings, task = result.data, result.recipe.export, result.task
    if not (settings.byproducts and (result.byproducts or lost)):
        return []
    student = byproducts.student_row(result.arch, result.student, data, result.verification, task)
    return [student, *byproducts.export(result.byproducts, lost, data, settings, result.path, result.info(), task)]


def _stopped(folder: Path, go_on: str) -> str:
    told = (
        f"Stopped: training is done, and {folder / checkpoint.BEST} is the student; its files are not all written. "
        f"Continue with: {go_on}"
    )
    if (run_folder.read_student(folder) or {}).get("rebuildable"):
        told += f"\nTo write the files alone: okdc export {quote(str(folder))}"
    return told
