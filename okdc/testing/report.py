"""Every demand on one method, tried in turn, and what came of it, as a page for a person."""

from __future__ import annotations

import logging
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from okdc import methods
from okdc.errors import OkdcError, first_line
from okdc.methods import Method
from okdc.system.randomness import own_randomness
from okdc.testing.case import Case
from okdc.testing.contract import DEMANDS, cost
from okdc.testing.processes import two_processes, unreachable

Verdict = Literal["ok", "broken", "note", "skipped"]


@dataclass(frozen=True)
class Row:
    """One demand, what came of it, and why."""

    demand: str
    verdict: Verdict
    words: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """What `check` found out about a method; `str` of it is for a person."""

    method: str
    network: str
    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not any(row.verdict == "broken" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        width = max(len(row.demand) for row in self.rows) + 2
        lines = [f"{self.method} around {self.network}", ""]
        for row in self.rows:
            lines.append(f"{row.verdict:9}{row.demand:{width}}{row.seconds:6.1f} s".rstrip())
            lines += textwrap.wrap(row.words, 110, initial_indent=" " * 9, subsequent_indent=" " * 9)
        broken = sum(row.verdict == "broken" for row in self.rows)
        return "\n".join([*lines, "", f"{broken} broken." if broken else "Nothing is broken."])


def check(
    method: str | type[Method], network: str = "resnet20_cifar", *, size: int = 32, processes: bool = True,
    **settings: Any,
) -> Report:  # fmt: skip
    """Try every demand of okdc on a method around a network by name, on noise of `size` pixels; a minute or less.

    settings: of the method. processes: also hold two processes against one. RecipeError for a method or setting that
    does not exist, NetworkError for such a network.
    """
    case = Case(method, network, size, settings)
    report = Report(case.kind.__name__, network)
    case.target()
    methods.refuse_settings(methods.name_of(method), settings)
    with own_randomness():
        built = _try_step(case, report)
        if built is None:
            return report
        for demand, function in DEMANDS.items():
            report.rows.append(_row(demand, lambda function=function: function(case)))  # type: ignore[misc]
        reason = unreachable(case) if processes else "it was left out (--no-processes)"
        together = "two processes give what one gives"
        skipped = Row(together, "skipped", f"{reason}.")
        report.rows.append(skipped if reason else _row(together, lambda: two_processes(case)))
    report.rows.append(Row("cost of a step", "ok", cost(case, built)))
    return report


def _try_step(case: Case, report: Report) -> Method | None:
    """The method, tried as before training: an error ends the check, what could be meant is a note."""
    began, said = time.perf_counter(), list[str]()
    demand = "it can be built and tried"
    try:
        with _heard(said):
            built = case.build()
    except Exception as error:
        report.rows.append(Row(demand, "broken", _words(error), time.perf_counter() - began))
        return None
    report.rows.append(Row(demand, "note" if said else "ok", " ".join(said), time.perf_counter() - began))
    return built


def _row(demand: str, function: Callable[[], None]) -> Row:
    began = time.perf_counter()
    try:
        with _heard([]):
            function()
    except Exception as error:
        return Row(demand, "broken", _words(error), time.perf_counter() - began)
    return Row(demand, "ok", "", time.perf_counter() - began)


def _words(error: Exception) -> str:
    """What a demand or okdc says, or where the method's own code failed."""
    if isinstance(error, OkdcError):
        return str(error)
    if isinstance(error, AssertionError):
        return f"{first_line(error)}."
    return f"{type(error).__name__}: {first_line(error)} ({_place(error)})."


def _place(error: BaseException) -> str:
    """The file and line that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"


@contextmanager
def _heard(said: list[str]) -> Iterator[None]:
    """Warnings of okdc go to `said` meanwhile, and nowhere else."""

    def keep(entry: logging.LogRecord) -> bool:
        said.append(entry.getMessage())
        return False

    log = logging.getLogger("okdc")
    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)
