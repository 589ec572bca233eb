"""The group of all commands: what they have in common, and how an error is shown."""

from __future__ import annotations

import os
import shutil
import textwrap
import traceback
from typing import Any

import click

from okdc import __version__
from okdc.cli.output import VERBOSE, show
from okdc.errors import OkdcError

_COMMANDS = ("  okdc ", "  python ")


class _Failure(click.ClickException):
    """An OkdcError as click shows it: one paragraph on stderr, no traceback."""

    def __init__(self, error: OkdcError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        who = f" on rank {os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else ""
        for line in f"okdc: error{who}: {self.message}".splitlines():
            typed = line.startswith(_COMMANDS)  # a command is copied whole
            click.echo(line if typed else _wrapped(line, " " * (len(line) - len(line.lstrip()) + 2)), err=True)


def _wrapped(line: str, hang: str) -> str:
    """A line as wide as the terminal, what goes on below indented by `hang`; no word is broken."""
    width = max(40, shutil.get_terminal_size().columns - 1)
    return textwrap.fill(line, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OkdcError as error:
            if ctx.find_root().meta.get(VERBOSE):
                traceback.print_exc()
            if found := getattr(error, "verification", None):
                from okdc.cli import tables

                show(found, lambda: tables.show_verification(found))
            raise _Failure(error) from error
        except click.UsageError as error:
            told = _wrapped(f"Error: {error.message}", "  ")
            error.message = told.removeprefix("Error: ")  # type: ignore[misc]
            raise
        except KeyboardInterrupt:
            click.echo("\nokdc: interrupted.", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which they are used


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", message="okdc %(version)s")
def main() -> None:
    """Make a vision network more accurate without making it bigger, then export it, verified.

    okdc trains your network together with branches that teach it. Then it removes the branches, and ships your network.

    \b
    okdc compress                           try it: real digits, about a minute
    okdc compress --data DIR --method one   your images, in DIR/train and DIR/val
    okdc compare --data DIR                 see whether a method helps
    okdc export runs/NAME --onnx --trt      write and verify what you deploy
    """
