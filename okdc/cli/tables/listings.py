"""What there is to choose from, and what a machine has."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from okdc import methods
from okdc.cli.tables import page

if TYPE_CHECKING:
    from okdc.measure.doctor import Finding


def facts_of_method(name: str) -> dict[str, Any]:
    """A method as plain values: what it is, what a training step runs, what it needs, its card and its settings."""
    kind, card = methods.get(name), methods.card(name)
    settings = [
        {"name": each.name, "default": each.default, "type": inspect.formatannotation(each.annotation)}
        for each in methods.settings(name).parameters.values()
    ]
    told = {"name": name, "summary": card.splitlines()[0], "step": kind.cost(), "needs": list(kind.asks())}
    return told | {"settings": settings, "card": card}


def settings_of(name: str) -> str:
    """The settings of a method with their types and defaults, as text."""

    parameters = methods.settings(name).parameters.values()
    lines = [f"    {p.name} = {p.default}  ({inspect.formatannotation(p.annotation)})" for p in parameters]
    return "\n".join(["Settings (--method-kwargs NAME=VALUE):", *(lines or ["    none"])])


def show_methods() -> None:
    """One row per method: what it is, what one training step costs, what it needs."""
    table = page.table("method", "what it is", "a step runs", "needs")
    for column, width in zip(table.columns[1:], (None, 16, 15), strict=True):
        column.no_wrap, column.max_width = False, width
    for name in methods.names():
        kind, card = methods.get(name), methods.card(name)
        table.add_row(f"[bold]{name}[/]", escape(card.splitlines()[0]), kind.cost(), escape(", ".join(kind.asks())))
    page.console().print(table)
    page.next_command("okdc methods NAME")


def show_findings(findings: list[Finding]) -> None:
    """One line for each thing that a machine has or lacks, what to do about them below."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    states = {True: "[green]ok[/]", False: "[red]mend[/]", None: "–"}
    for finding in findings:
        table.add_row(finding.name, states[finding.ok], escape(finding.found))
    console = page.console()
    console.print(table)
    for finding in findings:
        if finding.advice:  # commands to copy, so never wrapped
            console.print(f"\n{escape(finding.name)}: [bold]{escape(finding.advice)}[/]", soft_wrap=True)
    wrong = sum(finding.ok is False for finding in findings)
    console.print(f"\n{wrong} to mend." if wrong else "\nNothing to mend.")
