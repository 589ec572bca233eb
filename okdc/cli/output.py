"""What all commands have in common: how much they say (-q, -v), and whether people or programs read it (--json)."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import click

from okdc.system import saying

VERBOSE = "okdc.verbose"  # where a command's context has whether -v was typed
_STDOUT = "okdc.stdout"  # and where the JSON goes, if --json was


def options() -> list[click.Parameter]:
    """The options -q, -v and --json, which act before the command begins."""

    def quiet(ctx: click.Context, _: click.Parameter, wish: bool) -> None:
        ctx.with_resource(saying.less(wish))

    def verbose(ctx: click.Context, _: click.Parameter, wish: bool) -> None:
        ctx.find_root().meta[VERBOSE] = wish
        if wish:
            ctx.with_resource(_libraries_heard())

    def as_json(ctx: click.Context, _: click.Parameter, wish: bool) -> None:
        ctx.find_root().meta[_STDOUT] = sys.stdout if wish else None

    said: dict[str, Any] = {"is_flag": True, "expose_value": False, "is_eager": True}
    return [
        click.Option(["--json"], callback=as_json, help="Print the results as JSON; all else goes to stderr.", **said),
        click.Option(
            ["-q", "--quiet"], callback=quiet, help="No progress: only results, warnings and errors.", **said
        ),
        click.Option(
            ["-v", "--verbose"], callback=verbose,
            help="Also what libraries report, and where in the code an error arose.", **said,
        ),
    ]  # fmt: skip


@contextmanager
def _libraries_heard() -> Iterator[None]:
    """Meanwhile what libraries report is printed on stderr."""
    root, handler = logging.getLogger(), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


@contextmanager
def json_alone(ctx: click.Context) -> Iterator[None]:
    """With --json, whatever else is printed meanwhile goes to stderr: a library's notes, rows of a sweep."""
    if ctx.find_root().meta.get(_STDOUT) is None:
        yield
    else:
        with redirect_stdout(sys.stderr):
            yield


def show(facts: Any, draw: Callable[[], None]) -> None:
    """Print what a command found: its facts, plain values, as one JSON document with --json; else what `draw` draws."""
    stdout = click.get_current_context().find_root().meta.get(_STDOUT)
    if stdout is None:
        draw()
    else:
        print(json.dumps(facts, indent=2, allow_nan=False), file=stdout)
