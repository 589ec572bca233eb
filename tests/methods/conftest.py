"""`pytest tests/methods --golden-table` ends with how many golden values each method was compared with, how closely."""

from __future__ import annotations

from typing import Any

import pytest

from tests.methods import golden

_found: dict[str, tuple[set[str], list[float]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-table", action="store_true", help="count the golden comparisons of each method")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """What a test compared goes with its report, which is all that comes back from another process (xdist)."""
    report = yield
    if call.when == "call":
        report.user_properties.append(("golden", [{k: list(v) for k, v in golden.files.items()}, dict(golden.errors)]))
        golden.files.clear(), golden.errors.clear()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for files, errors in (value for key, value in report.user_properties if key == "golden" and report.when == "call"):
        for method in files | errors:
            read, compared = _found.setdefault(method, (set(), []))
            read |= set(files.get(method, ()))
            compared += errors.get(method, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--golden-table", default=False):
        rows = [(name, len(read), len(errors), max(errors, default=0)) for name, (read, errors) in _found.items()]
        rows = sorted(row for row in rows if row[2])
        totals = ("all", sum(r[1] for r in rows), sum(r[2] for r in rows), max((r[3] for r in rows), default=0))
        terminalreporter.write_line(f"\n{'golden':12}{'files':>7}{'comparisons':>13}{'worst relative error':>22}")
        for name, read, compared, worst in (*rows, totals):
            terminalreporter.write_line(f"{name:12}{read:7}{compared:13}{worst:22.1e}")
