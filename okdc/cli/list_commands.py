"""methods, check, recipes, doctor: what there is to choose from and to use, and whether a method is sound."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import click

from okdc import recipe
from okdc.cli import early, flags
from okdc.cli.group import main
from okdc.errors import RecipeError


@main.command(short_help="List the methods, or show the card of one.")
@click.argument("name", required=False, shell_complete=early.complete_method)
def methods(name: str | None) -> None:
    """List the methods, or show the card of one.

    \b
    okdc methods
    okdc methods ahbf
    """
    from okdc import methods as known
    from okdc.cli import tables

    if name:
        click.echo(wrapped(known.card(name), shutil.get_terminal_size().columns))
        click.echo(f"\n{tables.settings_of(name)}")
    else:
        tables.show_methods()


@main.command(short_help="Try what every method has to do on one of your own.")
@click.argument("method", metavar="FILE.py:CLASS|NAME", shell_complete=early.complete_method)
@click.option("--model", metavar="NAME", default="resnet20_cifar", show_default=True, help="Around this network.")
@click.option("--img-size", type=click.IntRange(1), default=32, show_default=True, help="Side of the images, pixels.")
@click.option("--method-kwargs", type=flags.KeyValue(), multiple=True, help="A setting of the method; repeatable.")
@click.option("--processes/--no-processes", default=True, help="Hold two processes against one, too.  [on]")
@flags.json_option
def check(
    method: str,
    model: str,
    img_size: int,
    method_kwargs: tuple[tuple[str, Any], ...],
    processes: bool,
    as_json: bool,
) -> None:
    """Try what every method has to do, on noise: who learns, exact resume, strip, two processes, what it costs.

    It takes a minute or less. The exit code is 1 where something is broken.

    \b
    okdc check my_file.py:MyMethod
    okdc check my_package.my_module:MyMethod --model resnet18 --img-size 64
    """
    from okdc import testing

    report = testing.check(method, model, size=img_size, processes=processes, **dict(method_kwargs))
    click.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    if not report.ok:
        click.get_current_context().exit(1)


@main.command()
@click.argument("words", nargs=-1, metavar="[NAME | copy NAME DIR]", shell_complete=early.complete_recipe)
def recipes(words: tuple[str, ...]) -> None:
    """List the recipes, print one, or copy one to change it.

    \b
    okdc recipes
    okdc recipes cifar100/resnet32-ahbf
    okdc recipes copy cifar100/resnet32-ahbf .
    """
    if not words:
        width, columns = max(map(len, recipe.names()), default=0) + 2, shutil.get_terminal_size().columns
        for name in recipe.names():
            told = f"{name:{width}}{_first_line(recipe.path(name).read_text(encoding='utf-8'))}"
            hang = " " * width
            click.echo(
                textwrap.fill(told, columns, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)
            )
    elif words[0] == "copy" and len(words) in (2, 3):
        click.echo(f"wrote {_copy(words[1], Path(words[2] if words[2:] else '.'))}")
    elif len(words) == 1:
        click.echo(recipe.path(words[0]).read_text(encoding="utf-8").rstrip())
    else:
        raise click.UsageError("expected no argument, NAME, or copy NAME DIR")


@main.command(short_help="Say what this machine has, and what to install.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for a report of a fault.")
def doctor(as_json: bool) -> None:
    """Say what this machine has for training and deploying, and what to type where something is missing.

    \b
    okdc doctor
    okdc doctor --json
    """
    from okdc.cli import tables
    from okdc.measure import doctor as doctors

    findings = doctors.examine()
    if as_json:
        click.echo(json.dumps(doctors.as_json(findings), indent=2))
    else:
        tables.show_findings(findings)


def wrapped(card: str, width: int) -> str:
    """A card at the width of the terminal: paragraphs and `Name: ` items are filled anew, where a line is too long."""
    paragraphs = []
    for paragraph in card.split("\n\n"):
        if max(map(len, paragraph.splitlines()), default=0) > width and not paragraph.startswith(" "):
            items = re.split(r"\n(?=\w+: )", paragraph)
            paragraph = "\n".join(
                textwrap.fill(
                    " ".join(item.split()), width, subsequent_indent="    " * bool(re.match(r"\w+: ", item)),
                    break_long_words=False, break_on_hyphens=False,
                )
                for item in items
            )  # fmt: skip
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _copy(name: str, folder: Path) -> Path:
    source = recipe.path(name)
    target = folder / source.name
    if target.exists():
        raise RecipeError(f"{target} is there already: give another folder, or move it away.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def _first_line(text: str) -> str:
    return next((line.lstrip("# ").strip() for line in text.splitlines() if line.strip("# ")), "")
