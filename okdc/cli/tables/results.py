"""What came of a run: the student's figures, the files that were written, and which of them may ship."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from okdc import tasks
from okdc.cli.tables import page
from okdc.deploy import UNKNOWN
from okdc.errors import counted
from okdc.pipeline import facts, run_folder
from okdc.report import words
from okdc.report.rendering import plain

if TYPE_CHECKING:
    from okdc.pipeline import Result
    from okdc.tasks.task import Task
    from okdc.verification.schema import Latency, Row, Verification


def prediction(predict: Path) -> str:
    """What to type to try predict.py: by the Python that runs here, which has what it needs."""
    python, here = Path(sys.executable), Path.cwd()
    if python.is_relative_to(here):
        python = python.relative_to(here)
    name = "python" if shutil.which("python") == sys.executable else str(python)
    return f"{shlex.join([name, str(predict)])} IMAGE"


def facts_of_result(result: Result) -> dict[str, Any]:
    """A run as plain values: its figures (per cent), those of its baseline, and where everything is."""
    found = run_folder.find_baseline(result.path, result.recipe)
    byproducts = {name: result.path / "byproducts" / name for name in result.byproducts}
    told: dict[str, Any] = plain(
        {
            "run": result.path,
            "network": result.arch,
            "method": result.recipe.method["name"],
            "data": result.data.name,
            "task": result.task.name,
            "parameters": sum(p.numel() for p in result.student.parameters()),
            "validation_images": result.data.sizes[1],
            "metrics": result.metrics,
            "baseline": {"run": result.path.parent / found["name"], "metrics": found["metrics"]} if found else None,
            "report": result.path / "report.html",
            "bundle": result.path / "export" if result.verification else None,
            "byproducts": {name: place if place.is_dir() else None for name, place in byproducts.items()},
            "verification": result.verification,
        }
    )
    return told


def show_result(result: Result) -> None:
    """The student's accuracy beside its baseline, what was exported, where everything is, and the next command."""
    metrics, folder, task = result.metrics, result.path, result.task
    images = result.data.sizes[1] if task.is_share else None
    found = run_folder.find_baseline(folder, result.recipe)
    before = found["metrics"].get(task.metric) if found else None
    table = page.table("", "")
    for label, value in [
        (f"Student, {task.word}, ships", _scored(metrics.get(task.metric), images)),
        (f"Baseline, {task.word}", _scored(before, images)),
        ("… on the images set aside", page.percent(metrics.get("holdout"))),
        *(
            (f"Student, {each.word}", page.figure(metrics.get(name), each.unit))
            for name, each in task.further()
            if name not in task.scores
        ),
        (
            f"Ensemble, {task.word}" + ", does not ship" * (not result.byproducts),
            _scored(metrics.get(f"ensemble_{task.metric}"), images),
        ),
        ("Parameters, ship", f"{sum(p.numel() for p in result.student.parameters()):,}"),
        ("Training time", page.time(metrics.get("seconds"))),
        ("Stopped early", metrics.get("stopped_early")),
    ]:
        if value is not None:
            table.add_row(label, escape(value))
    console = page.console()
    console.print("\n", table, sep="")
    for label, place in [
        ("Report", str(folder / "report.html")),
        ("Bundle", str(folder / "export") if result.verification else None),
        *((f"Also trained: {name}", _whereabouts(folder / "byproducts" / name)) for name in result.byproducts),
    ]:
        if place is not None:  # to be copied, so never wrapped
            console.print(f"{label}: {place}", soft_wrap=True, markup=False)
    if told := words.chance(metrics.get(task.metric), before, images):
        console.print(f"\n{told}", markup=False)
        console.print(facts.same_rate(folder, result.recipe), soft_wrap=True, markup=False)
    elif (
        found is None
        and result.recipe.method["name"] != "baseline"
        and (command := facts.control_command(folder, result.recipe))
    ):
        console.print(f"\nNo baseline yet. To see what the other members add: {command}", soft_wrap=True, markup=False)
    if result.verification:
        predict = folder / "export" / "predict.py"  # where there is a file that it runs
        show_verification(result.verification, prediction(predict) if predict.is_file() else None)
    else:
        page.next_command(f"okdc export {folder} --onnx")


def _scored(value: float | None, images: int | None) -> str | None:
    return None if value is None else f"{value:.2f} %{words.uncertain(value, images)}"


def _whereabouts(bundle: Path) -> str:
    """Where a further network of the training is, or that the report says why it is not there."""
    return str(bundle) if bundle.is_dir() else "not exported; the report says more"


def show_verification(verification: Verification, next_command: str | None = None, source: str = "RUN") -> None:
    """One row per exported file: accuracy, agreement with torch, latency, and whether it may ship.

    The last line is the command to type next; `source` is what was exported.
    """
    rows, task = verification["rows"], tasks.of(verification)
    batches = [str(each["batch"]) for each in max((row.get("latency") or [] for row in rows), key=len, default=[])]
    timing = f"ms/image (batch {', '.join(batches)})" if batches else "ms/image"
    table = page.table("exported", "MB", task.word, "agrees\nwith torch", "max diff", timing, "ships")
    table.columns[0].no_wrap, table.columns[-1].no_wrap = False, True  # a narrow terminal folds names, not verdicts
    for row in rows:
        table.add_row(
            escape(row["name"]),
            "" if row.get("mb") is None else f"{row['mb']:.1f}",
            page.percent(_score(row, task)) or "",
            page.percent(row.get("agreement")) or "",
            "" if row.get("max_abs") is None else f"{row['max_abs']:.1e}",
            _latency(row.get("latency") or []),
            _ships(row),
        )
    reasons = [f"{row['name']}: {row['reason']}" for row in rows if row.get("reason")]
    console = page.console()
    console.print()
    console.print(table)
    for reason in reasons:
        console.print(f"  {escape(reason)}", soft_wrap=True)
    images = counted(verification["images"], "image") if verification.get("images") else "no images"
    images = sample["told"] if (sample := verification.get("sample")) else images
    count = verification.get("threads")
    threads = f" with {counted(count, 'thread')}" if count else ""
    device = str(verification.get("device")).upper()
    console.print(
        f"Verified on {images}, on the {device}{threads}. A file agrees with torch where it predicts {task.same}."
    )
    recommended = verification.get("recommended")
    if recommended:
        console.print(f"Recommended here: [bold]{escape(recommended['file'])}[/], {escape(recommended['why'])}.")
    for skipped in verification.get("skipped", []):
        told = escape(f"{skipped['target']}: {skipped['reason']}")
        console.print(f"[yellow]Skipped[/]: {told}", soft_wrap=True)
    if any(skipped["reason"] == UNKNOWN for skipped in verification.get("skipped", [])):
        next_command = f"okdc export {source} --mean R,G,B --std R,G,B"
    if next_command:
        page.next_command(next_command)


def _score(row: Row, task: Task) -> Any:
    return row.get(task.metric)


def _ships(row: Row) -> str:
    if not row.get("pass"):
        return "[red]no[/]"
    return "[yellow]not worth it[/]" if row.get("worth_shipping") is False else "[green]yes[/]"


def _latency(measured: list[Latency]) -> str:
    return ", ".join(f"{each['p50_ms'] / each['batch']:.2f}" for each in measured)
