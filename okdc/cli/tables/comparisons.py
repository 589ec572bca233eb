"""What was measured side by side: methods and plain training, formats of a network, steps of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from okdc.cli.tables import page
from okdc.comparing.comparison import facts_of
from okdc.errors import counted
from okdc.report.rendering import plain

if TYPE_CHECKING:
    from rich.table import Table

    from okdc.comparing import Comparison
    from okdc.comparing.gains import Gain, Spread
    from okdc.measure.step_cost import Profile


_WARNINGS = 8  # of a comparison, that are shown


def facts_of_comparison(found: Comparison) -> dict[str, Any]:
    """A comparison as plain values: those of compare.json."""
    told: dict[str, Any] = plain(facts_of(found))
    return told


def show_comparison(found: Comparison) -> None:
    """One line for each arm, the best first, and what to use."""
    equal = any(line.equal for line in found.lines)
    columns = ["over\nplain", *(["at equal\ncompute"] if equal else ()), "compute", "minutes"]
    table = page.table("", f"{facts_of(found)['metric']}, %\n± sd", *columns)
    _fold_names(table)
    for line in found.lines:
        minutes = "" if line.seconds is None else f"{line.seconds / 60:.1f}"
        gains = [_gained(line.gain), *([_gained(line.equal)] if equal else ())]
        table.add_row(escape(_parted(line.name)), _spread(line.spread), *gains, f"{line.compute:.2f}", minutes)
    console = page.console()
    console.print("\n", table, sep="")
    for line in found.lines:
        if line.problem:
            console.print(f"[red]{escape(line.name)}[/] is not complete: {escape(line.problem)}", soft_wrap=True)
    _show_warnings(found)
    console.print(
        f"Gains over plain training, for as many epochs{' and for as much compute' * equal}, are in points, ± half of "
        "their 95 % interval. Compute is in FLOPs, and that of plain training is 1. Minutes are those of a run."
    )
    console.print(f"\n[bold]{escape(found.verdict)}[/]")
    page.next_command(f"open {found.path / 'compare.html'}")


def _show_warnings(found: Comparison) -> None:
    """What the runs warned of, and where the rest of it is."""
    console = page.console()
    for each in found.warnings[:_WARNINGS]:
        console.print(f"[yellow]{escape(each.who)}[/]: {escape(each.text)}", soft_wrap=True)
    if (more := len(found.warnings) - _WARNINGS) > 0:
        console.print(f"{counted(more, 'more warning')}: {found.path / 'compare.md'}", soft_wrap=True, markup=False)


def _fold_names(table: Table) -> None:
    """A narrow terminal folds what is in the first column, and cuts no figure off."""
    table.columns[0].no_wrap, table.columns[-1].no_wrap = False, True


def _parted(name: str) -> str:
    """The name of an arm, baseline-80-epochs, with places where a line may end."""
    return name.replace("-epochs", " epochs").replace("baseline-", "baseline, ")


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "[red]none[/]"
    return f"{spread.mean:.2f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.2f}")


def _gained(gain: Gain | None) -> str:
    if gain is None:
        return ""
    return f"{round(gain.mean, 2) + 0.0:+.2f}" + ("" if gain.high is None else f" ± {gain.high - gain.mean:.2f}")


def show_benchmark(report: dict[str, Any]) -> None:
    """One line per format and batch size; what is not available is listed below, with the reason."""
    from okdc.measure import benchmark

    table = page.table(*(column for column in benchmark.columns(report) if column != "status"))
    _fold_names(table)
    for name, status, *cells in benchmark.lines(report):
        if not status.startswith("unavailable"):
            table.add_row(escape(name) if status.startswith("ok") else f"[red]{escape(name)}[/]", *cells)
    console = page.console()
    console.print("\n", table, sep="")
    console.print(f"\n{benchmark.title(report)}", markup=False)
    statuses = dict.fromkeys(row["status"] for row in report["rows"] if row["status"] != "ok")
    for status in statuses:
        names = ", ".join(row["format"] for row in report["rows"] if row["status"] == status)
        console.print(f"[yellow]{escape(names)}[/]: {escape(status)}", soft_wrap=True)
    if any(each["contended"] for row in report["rows"] for each in row["latency"]):
        console.print("Busy: something else used the processor meanwhile. CPU ms is less disturbed than the others.")


def show_profile(found: Profile) -> None:
    """A training step of the cohort beside the plain target's, one row per way of computing it."""
    console, on_cpu = page.console(), found.device == "CPU"
    clock = f"CPU time, {counted(found.threads, 'thread')}" if on_cpu else found.device
    console.print(
        f"[bold]{escape(found.method)}[/] around [bold]{escape(found.model)}[/], {page.shape(found.input_size)}, "
        f"batch {found.batch_size}: {found.flops_ratio:.2f} times the FLOPs of the target alone (a step, "
        "forward and backward)\n"
    )
    table = page.table("", "plain", "cohort", "ratio (spread)", "overhead", "speed", "MiB")
    for row in found.rows:
        spread = f"{row.ratio.low:.2f}-{row.ratio.high:.2f}"
        table.add_row(
            row.name, f"{row.plain.median:.4g}", f"{row.cohort.median:.4g}", f"{row.ratio.median:.2f} ({spread})",
            f"{row.overhead:.2f}", f"{row.speedup:.2f}x",
            f"{row.plain_memory / 2**20:.0f}/{row.cohort_memory / 2**20:.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"\nTimes are milliseconds for a step, {_medians(found.rounds)} ({clock}). Overhead is the ratio over that of "
        "the FLOPs. Speed is that of the cohort's step beside the first row's. MiB, plain/cohort, are what weights, "
        "the optimizer and a step take."
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


def _medians(rounds: int) -> str:
    return f"medians of {rounds} rounds in turn" if rounds > 1 else "measured once"
