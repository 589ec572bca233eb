"""What commands print when they are done: tables that a person understands."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from okdc import methods, tasks
from okdc.deploy import UNKNOWN
from okdc.errors import OkdcError, counted
from okdc.pipeline import facts, run_folder
from okdc.report import words
from okdc.system import saying

if TYPE_CHECKING:
    from okdc.anatomy import Anatomy
    from okdc.cohort import Cost
    from okdc.comparing import Comparison
    from okdc.comparing.gains import Gain
    from okdc.measure.doctor import Finding
    from okdc.measure.estimate import Estimate
    from okdc.measure.step_cost import Profile
    from okdc.pipeline import Result
    from okdc.recipe import Recipe
    from okdc.tasks.task import Task
    from okdc.verification.schema import Latency, Row, Verification


def show_result(result: Result) -> None:
    """The student's accuracy beside its control, what was exported, where everything is, and the next command."""
    metrics, folder, task = result.metrics, result.path, result.task
    images = result.data.sizes[1] if task.is_share else None
    found = run_folder.find_baseline(folder, result.recipe)
    before = found["metrics"].get(task.metric) if found else None
    table = _table("", "")
    for label, value in [
        (f"Student, {task.word}, ships", _scored(metrics.get(task.metric), images)),
        (f"Control, {task.word}", _scored(before, images)),
        ("… on the images set aside", _percent(metrics.get("holdout"))),
        *(
            (f"Student, {each.word}", _told(metrics.get(name), each.unit))
            for name, each in task.further()
            if name not in task.scores
        ),
        (
            f"Ensemble, {task.word}" + ", does not ship" * (not result.byproducts),
            _scored(metrics.get(f"ensemble_{task.metric}"), images),
        ),
        ("Parameters, ship", f"{sum(p.numel() for p in result.student.parameters()):,}"),
        ("Training time", _time(metrics.get("seconds"))),
        ("Stopped early", metrics.get("stopped_early")),
    ]:
        if value is not None:
            table.add_row(label, escape(value))
    console = _console()
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
    elif (
        found is None
        and result.recipe.method["name"] != "baseline"
        and (command := facts.control_command(folder, result.recipe))
    ):
        console.print(f"\nNo control yet. To see what the other members add: {command}", soft_wrap=True, markup=False)
    if result.verification:
        predict = folder / "export" / "predict.py"  # where there is a file that it runs
        show_verification(result.verification, f"python {predict} IMAGE" if predict.is_file() else None)
    else:
        _next(f"okdc export {folder} --onnx")


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
    table = _table("exported", "MB", task.word, "agrees\nwith torch", "max diff", timing, "ships")
    table.columns[0].no_wrap, table.columns[-1].no_wrap = False, True  # a narrow terminal folds names, not verdicts
    for row in rows:
        table.add_row(
            escape(row["name"]),
            "" if row.get("mb") is None else f"{row['mb']:.1f}",
            _percent(_score(row, task)) or "",
            _percent(row.get("agreement")) or "",
            "" if row.get("max_abs") is None else f"{row['max_abs']:.1e}",
            _latency(row.get("latency") or []),
            _ships(row),
        )
    reasons = [f"{row['name']}: {row['reason']}" for row in rows if row.get("reason")]
    console = _console()
    console.print()
    console.print(table)
    for reason in reasons:
        console.print(f"  {escape(reason)}", soft_wrap=True)
    images = counted(verification["images"], "image") if verification.get("images") else "no images"
    images = sample["told"] if (sample := verification.get("sample")) else images
    count = verification.get("threads")
    threads = f" with {counted(count, 'thread')}" if count else ""
    console.print(f"Verified on {images}, {verification.get('device')}{threads}. To agree is to predict {task.same}.")
    recommended = verification.get("recommended")
    if recommended:
        console.print(f"Recommended here: [bold]{escape(recommended['file'])}[/], {escape(recommended['why'])}.")
    for skipped in verification.get("skipped", []):
        told = escape(f"{skipped['target']}: {skipped['reason']}")
        console.print(f"[yellow]Skipped[/]: {told}", soft_wrap=True)
    if any(skipped["reason"] == UNKNOWN for skipped in verification.get("skipped", [])):
        next_command = f"okdc export {source} --mean R,G,B --std R,G,B"
    if next_command:
        _next(next_command)


def _score(row: Row, task: Task) -> Any:
    return row.get(task.metric)


def _ships(row: Row) -> str:
    if not row.get("pass"):
        return "[red]no[/]"
    return "[yellow]not worth it[/]" if row.get("worth_shipping") is False else "[green]yes[/]"


def show_comparison(found: Comparison) -> None:
    """One line for each arm, the best first, and what to use."""
    table = _table("", found.metric, "± sd", "over plain", "equal compute", "compute", "epochs", "time")
    for line in found.lines:
        spread = line.spread
        table.add_row(
            escape(line.name), _percent(spread.mean if spread else None) or "[red]none[/]",
            f"{spread.deviation:.2f}" if spread and spread.deviation is not None else "",
            _gained(line.gain), _gained(line.equal), f"{line.compute:.2f}", str(line.epochs), _time(line.seconds) or "",
        )  # fmt: skip
    console = _console()
    console.print("\n", table, sep="")
    for line in found.lines:
        if line.problem:
            console.print(f"[red]{escape(line.name)}[/] is not complete: {escape(line.problem)}", soft_wrap=True)
    console.print("Gains in points, with the 95 % interval; compute in FLOPs, plain training is 1.")
    console.print(f"\n[bold]{escape(found.verdict)}[/]")
    _next(f"open {found.path / 'compare.html'}")


def _gained(gain: Gain | None) -> str:
    if gain is None:
        return ""
    return f"{gain.mean:+.2f}" if gain.low is None else f"{gain.mean:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})"


def show_benchmark(report: dict[str, Any]) -> None:
    """One line per format and batch size; what is not available is listed below, with the reason."""
    from okdc.measure import benchmark

    table = _table(*(column for column in benchmark.columns(report) if column != "status"))
    for name, status, *cells in benchmark.lines(report):
        if not status.startswith("unavailable"):
            table.add_row(escape(name) if status.startswith("ok") else f"[red]{escape(name)}[/]", *cells)
    console = _console()
    console.print("\n", table, sep="")
    console.print(f"\n{benchmark.title(report)}", markup=False)
    statuses = dict.fromkeys(row["status"] for row in report["rows"] if row["status"] != "ok")
    for status in statuses:
        names = ", ".join(row["format"] for row in report["rows"] if row["status"] == status)
        console.print(f"[yellow]{escape(names)}[/]: {escape(status)}", soft_wrap=True)
    if any(each["contended"] for row in report["rows"] for each in row["latency"]):
        console.print("Busy: something else used the processor meanwhile. CPU ms is less disturbed than the others.")


def settings_of(name: str) -> str:
    """The settings of a method with their types and defaults, as text."""

    parameters = methods.settings(name).parameters.values()
    lines = [f"    {p.name} = {p.default}  ({inspect.formatannotation(p.annotation)})" for p in parameters]
    return "\n".join(["Settings (--method-kwargs NAME=VALUE):", *(lines or ["    none"])])


def show_methods() -> None:
    """One row per method: what it is, what one training step costs, what it needs."""
    table = _table("method", "what it is", "a step runs", "needs")
    for column, width in zip(table.columns[1:], (None, 16, 15), strict=True):
        column.no_wrap, column.max_width = False, width
    for name in methods.names():
        kind, card = methods.get(name), methods.card(name)
        table.add_row(f"[bold]{name}[/]", escape(card.splitlines()[0]), kind.cost(), escape(", ".join(kind.asks())))
    _console().print(table)
    _next("okdc methods NAME")


def show_anatomy(model: str, anatomy: Anatomy, cut: str | None, refused: Callable[[str], str | None]) -> None:
    """Stages and cuts of a network; `cut` or else the default is marked, and its tail's share of the cost given.

    `refused` says why no branch can part after a cut; None where one can.
    """
    console = _console()
    console.print(
        f"[bold]{escape(model)}[/]: {anatomy.params:,} parameters, {anatomy.flops / 1e9:.3g} GFLOPs "
        f"for {_shape(anatomy.input_size)}"
    )
    console.print(
        f"classifier {anatomy.classifier} ({anatomy.num_classes} classes), embedding of {anatomy.embedding}, "
        f"feature map {_shape(anatomy.feature_shape)} ({anatomy.layout}) from {anatomy.feature_map}"
    )
    stages = _table("stage", "ends with", "size", "blocks that can be repeated")
    for index, stage in enumerate(anatomy.stages, 1):
        stages.add_row(str(index), stage.last, str(stage.size), _blocks(stage.blocks))
    console.print()
    console.print(stages)
    console.print()
    chosen = anatomy.find_cut(cut).name if cut else anatomy.cut()
    cuts = _table("cut after", "shape", "FLOPs after", "params after", "used by")
    used = _cuts_of_methods(anatomy)
    for each in sorted(
        {*anatomy.choices(), *map(anatomy.find_cut, {chosen, *used})}, key=lambda each: -each.flops_after
    ):
        mark = "asked for" if cut == each.name else "default"
        mark = mark if each.name in (cut, anatomy.cut()) else ", ".join(used.get(each.name, ()))
        cuts.add_row(each.name, _shape(each.shape), f"{each.flops_after:.0%}", f"{each.params_after:.0%}", mark)
    console.print(cuts)
    if refusal := refused(chosen):
        console.print(f"\nNo branch can part after {chosen}: {refusal}", markup=False)
        return
    _next(f"okdc compress --model {model} {f'--cut {cut} ' if cut else ''}--data DIR")


def _cuts_of_methods(anatomy: Anatomy) -> dict[str, list[str]]:
    """The methods by the cut that each of them takes if none is asked for."""
    used: dict[str, list[str]] = {}
    for name in methods.names():
        try:
            cuts = dict.fromkeys(branch.cut for branch in methods.get(name).plan(anatomy) if branch.cut)
        except OkdcError:  # a method that this network is not for says so where it is asked for
            continue
        for cut in cuts:
            used.setdefault(cut, []).append(name)
    return used


def show_estimate(recipe: Recipe, found: Estimate) -> None:
    """What a method would build around a network, and what training it takes: parameters, FLOPs, memory."""
    console, name, model = _console(), recipe.method["name"], recipe.network.model
    console.print(
        f"[bold]{escape(name)}[/] around [bold]{escape(model)}[/], {_shape(found.input_size)}, {found.classes} classes"
        f": {counted(len(found.networks), 'network')}\n"
    )
    roles = _table("", "")  # in a table of its own, with room for the names of modules
    table = _table("", "parts after", "parameters", "its own", "MFLOPs/image")
    for column in table.columns[2:]:
        column.justify = "right"
    for index, each in enumerate(found.networks):
        roles.add_row(escape(each.name), escape(_role(index, each)))
        table.add_row(
            each.name, escape(each.cut or ""), f"{each.params:,}", f"{each.own_params:,}", _millions(each.flops)
        )
    rest = found.flops - sum(each.flops for each in found.networks)
    table.add_row(
        f"{escape(name)} itself", "", f"{found.own_params:,}", f"{found.own_params:,}", _millions(max(0, rest))
    )
    console.print(roles, "", table, sep="\n")
    if found.teacher_stands_in:
        console.print(f"\nNo teacher was given: a new {escape(model)} stands in for it. Give yours with --teacher.")
    batch = recipe.train.batch_size
    console.print(
        f"\n{found.trained_params:,} parameters learn, at {found.relative:.2f} times the FLOPs of the target alone "
        "(forward)."
    )
    console.print(
        f"Memory in float32, estimated: {_megabytes(found.fixed)} of weights, gradients and momentum, and "
        f"{_megabytes(found.activations)} per image that is kept for the backward pass: "
        f"{_megabytes(found.fixed + batch * found.activations)} for a batch of {batch}. Mixed precision halves most of "
        "what is kept; what the libraries take for themselves comes on top."
    )
    _next(f"okdc methods {name}")


def _role(index: int, each: Cost) -> str:
    if index == 0:
        return "the target, ships"
    if each.frozen:
        return f"{each.grown}, not trained"
    if each.cut is None:
        return f"peer network{': ' * bool(each.grown)}{each.grown}"
    return each.grown or "the same tail again"


def show_row(row: dict[str, Any]) -> None:
    """One line about one network of a sweep, as soon as it is done."""
    colour = {"ok": "green", "partly": "yellow"}.get(row["outcome"], "red")
    what = row.get("reason") or f"after {row['cut']}, {row['tail_flops']:.0%} of the FLOPs; {row['grown']}"
    _console().print(
        f"[{colour}]{row['outcome']:8}[/] {escape(row['network'])}  {row['seconds']} s  {escape(what)}", soft_wrap=True
    )


def show_sweep(rows: list[dict[str, str]], summary: list[tuple[str, int]], path: str) -> None:
    """How many networks of a sweep there are of each outcome, those that are not ok by name, and where the table is."""
    counts = _table("", "")
    for label, count in summary:
        counts.add_row(label, str(count))
    console = _console()
    console.print("\n", counts, sep="")
    failures = _table("network", "outcome", "reason")
    for row in rows:
        if row["outcome"] != "ok":
            failures.add_row(row["network"], row["outcome"], escape(row["reason"]))
    if failures.row_count:
        console.print("\n", failures, sep="")
    console.print(f"\nThe table is {path}; {Path(path).with_suffix('.md')} says it in words.", markup=False)


def show_profile(found: Profile, as_json: bool = False) -> None:
    """A training step of the cohort beside the plain target's, one row per way of computing it."""
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    console, on_cpu = _console(), found.device == "CPU"
    clock = f"CPU time, {found.threads} thread{'s' * (found.threads > 1)}" if on_cpu else found.device
    console.print(
        f"[bold]{escape(found.method)}[/] around [bold]{escape(found.model)}[/], {_shape(found.input_size)}, "
        f"batch {found.batch_size}: {found.flops_ratio:.2f} times the FLOPs of the target alone (a step, "
        "forward and backward)\n"
    )
    table = _table("", "plain", "cohort", "ratio (spread)", "overhead", "speed", "MiB")
    for row in found.rows:
        spread = f"{row.ratio.low:.2f}-{row.ratio.high:.2f}"
        table.add_row(
            row.name, f"{row.plain.median:.4g}", f"{row.cohort.median:.4g}", f"{row.ratio.median:.2f} ({spread})",
            f"{row.overhead:.2f}", f"{row.speedup:.2f}x",
            f"{row.plain_memory / 2**20:.0f}/{row.cohort_memory / 2**20:.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"\nms a step, medians of {found.rounds} rounds in turn; {clock}. Overhead: ratio over that of the FLOPs. "
        "Speed: of the cohort's step beside the first row's. MiB, plain/cohort: weights, optimizer, what a step adds."
    )
    further = {
        "compiled steps, --torchcompile": any("compiled" in row.name for row in found.rows),
        "the input pipeline, --data": found.data is not None,
    }
    if missing := [what for what, measured in further.items() if not measured]:
        console.print(f"Measured where asked for: {'; '.join(missing)}.")
    if found.data:
        console.print(
            f"{escape(found.data.name)}: {found.data.images_per_second:,.0f} training images a second; training waits "
            f"for them {found.data.waiting:.0%} of its time."
        )


def show_findings(findings: list[Finding]) -> None:
    """One line for each thing that a machine has or lacks, what to do about them below."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    states = {True: "[green]ok[/]", False: "[red]mend[/]", None: "–"}
    for finding in findings:
        table.add_row(finding.name, states[finding.ok], escape(finding.found))
    console = _console()
    console.print(table)
    for finding in findings:
        if finding.advice:  # commands to copy, so never wrapped
            console.print(f"\n{escape(finding.name)}: [bold]{escape(finding.advice)}[/]", soft_wrap=True)
    wrong = sum(finding.ok is False for finding in findings)
    console.print(f"\n{wrong} to mend." if wrong else "\nNothing to mend.")


class _Recorded(Console):
    """A console whose tables are also in the run's log, without colours, while there is one."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print and record."""
        super().print(*objects, **options)
        if saying.is_logged():
            plain = Console(file=io.StringIO(), width=self.width, highlight=False)
            plain.print(*objects, **options)
            saying.record(plain.file.getvalue().strip("\n"))  # type: ignore[attr-defined]


def _console() -> Console:
    return _Recorded(highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, show_header=any(columns), header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index < len(columns) - 1)
    return table


def _next(command: str) -> None:
    _console().print(f"\nNext: [bold]{escape(command)}[/]", soft_wrap=True)


def _blocks(blocks: Iterable[tuple[str, ...]]) -> str:
    named = ["+".join(block) for block in blocks]
    return ", ".join(named) if len(named) < 4 else f"{named[0]} ... {named[-1]} ({len(named)})"


def _latency(measured: list[Latency]) -> str:
    return ", ".join(f"{each['p50_ms'] / each['batch']:.2f}" for each in measured)


def _told(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:.2f} {unit}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} %"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def _megabytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
