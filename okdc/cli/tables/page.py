"""What all tables are made of: a console that is recorded, columns, numbers as people read them."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from okdc.system import saying


class _Recorded(Console):
    """A console whose tables are also in the run's log, without colours, while there is one."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print and record."""
        super().print(*objects, **options)
        if saying.is_logged():
            plain = Console(file=io.StringIO(), width=self.width, highlight=False)
            plain.print(*objects, **options)
            saying.record(plain.file.getvalue().strip("\n"))  # type: ignore[attr-defined]


def console() -> Console:
    return _Recorded(highlight=False)


def table(*columns: str) -> Table:
    table = Table(box=None, show_header=any(columns), header_style="bold", padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=index < len(columns) - 1)
    return table


def next_command(command: str) -> None:
    console().print(f"\nNext: [bold]{escape(command)}[/]", soft_wrap=True)


def figure(value: float | None, unit: str) -> str | None:
    """A score in its unit."""
    return None if value is None else f"{value:.2f} {unit}"


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f} %"


def shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
