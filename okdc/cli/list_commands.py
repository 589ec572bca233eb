"""methods, check, recipes, doctor: what there is to choose from and to use, and whether a method is sound."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import click
import yaml

from okdc import recipe
from okdc.cli import completion, flags
from okdc.cli.group import main
from okdc.cli.output import show
from okdc.errors import RecipeError


@main.command(cls=flags.GroupedCommand, short_help="List the methods, or show the card of one.")
@click.argument("name", required=False, shell_complete=completion.complete_method)
def methods(name: str | None) -> None:
    """List the methods, or show the card of one.

    \b
    okdc methods
    okdc methods ahbf
    """
    from okdc import methods as known
    from okdc.cli import tables

    if name:
        show(tables.facts_of_method(name), lambda: _show_method(name))
    else:
        show([tables.facts_of_method(each) for each in known.names()], tables.show_methods)


@main.command(short_help="Try what every method has to do on one of your own.")
@click.argument("method", metavar="FILE.py:CLASS|NAME", shell_complete=completion.complete_method)
@click.option("--model", metavar="NAME", default="resnet20_cifar", show_default=True, help="Around this network.")
@click.option("--img-size", type=click.IntRange(1), default=32, show_default=True, help="Side of the images, pixels.")
@click.option("--method-kwargs", type=flags.KeyValue(), multiple=True, help="A setting of the method; repeatable.")
@click.option("--processes/--no-processes", default=True, help="Hold two processes against one, too.  [on]")
def check(
    method: str,
    model: str,
    img_size: int,
    method_kwargs: tuple[tuple[str, Any], ...],
    processes: bool,
) -> None:
    """Try what every method has to do, on noise: who learns, exact resume, strip, two processes, what it costs.

    It takes a minute or less. The exit code is 1 where something is broken.

    \b
    okdc check my_file.py:MyMethod
    okdc check my_package.my_module:MyMethod --model resnet18 --img-size 64
    """
    from okdc import testing

    report = testing.check(method, model, size=img_size, processes=processes, **dict(method_kwargs))
    show(report.to_dict(), lambda: click.echo(str(report)))
    if not report.ok:
        click.get_current_context().exit(1)


@main.command(cls=flags.GroupedCommand)
@click.argument("words", nargs=-1, metavar="[NAME | copy NAME DIR]", shell_complete=completion.complete_recipe)
def recipes(words: tuple[str, ...]) -> None:
    """List the recipes, print one, or copy one to change it.

    \b
    okdc recipes
    okdc recipes cifar100/resnet32-ahbf
    okdc recipes copy cifar100/resnet32-ahbf .
    """
    if not words:
        found = {name: _first_line(recipe.path(name).read_text(encoding="utf-8")) for name in recipe.names()}
        show([{"name": name, "summary": told} for name, told in found.items()], lambda: _show_recipes(found))
    elif words[0] == "copy" and len(words) in (2, 3):
        copied = str(_copy(words[1], Path(words[2] if words[2:] else ".")))
        show({"wrote": copied}, lambda: click.echo(f"wrote {copied}"))
    elif len(words) == 1:
        text = recipe.path(words[0]).read_text(encoding="utf-8").rstrip()
        show(yaml.safe_load(text), lambda: click.echo(text))
    else:
        raise click.UsageError("expected no argument, NAME, or copy NAME DIR")


@main.command(cls=flags.GroupedCommand, short_help="Say what this machine has, and what to install.")
def doctor() -> None:
    """Say what this machine has for training and deploying, and what to type where something is missing.

    \b
    okdc doctor
    okdc doctor --json
    """
    from okdc.cli import tables
    from okdc.measure import doctor as doctors

    findings = doctors.examine()
    show(doctors.as_json(findings), lambda: tables.show_findings(findings))


def _show_method(name: str) -> None:
    from okdc import methods as known
    from okdc.cli import tables

    click.echo(wrapped(known.card(name), shutil.get_terminal_size().columns))
    click.echo(f"\n{tables.settings_of(name)}")


def _show_recipes(found: dict[str, str]) -> None:
    width, columns = max(map(len, found), default=0) + 2, shutil.get_terminal_size().columns
    for name, told in found.items():
        click.echo(
            textwrap.fill(
                f"{name:{width}}{told}", columns, subsequent_indent=" " * width,
                break_long_words=False, break_on_hyphens=False,
            )
        )  # fmt: skip


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
