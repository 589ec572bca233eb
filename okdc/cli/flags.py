"""Command line options made from the recipe's dataclasses, grouped by section in --help; no torch."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import Field
from typing import Any, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from okdc.cli import completion, early, output, timm_flags
from okdc.errors import OkdcError
from okdc.recipe import Recipe, flat_settings
from okdc.recipe.strict import limits, parse

_TITLES = {
    "network": "Network",
    "cohort": "Cohort (what learns beside it)",
    "data": "Data",
    "train": "Training",
    "export": "Export and verification",
}


class KeyValue(click.ParamType):
    """`key=value`, the value read as YAML reads it: 4 is a number, [1, 2] a list, true a truth value."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not key=value", param, ctx)
        try:
            return key, parse(text, value)
        except OkdcError as error:
            self.fail(str(error), param, ctx)


class CommaList(click.ParamType):
    """Values separated by commas, each of one kind."""

    def __init__(self, element: click.ParamType) -> None:
        self.element = element
        self.name = f"{element.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if isinstance(value, list):
            return value
        return [self.element.convert(part.strip(), param, ctx) for part in value.split(",") if part.strip()]


class Setting(click.Option):
    """An option that is a recipe setting; `section` is where it belongs."""

    section: str | None = None


class GroupedCommand(click.Command):
    """A command whose --help lists its own options first, then the settings section by section.

    Lists may be typed as timm takes them, too: `--scale 0.5 1.0` beside `--scale 0.5,1.0`. `timm`: its other flags are
    known, those with nothing to do here and those that are refused. Data that are not there are refused at once, before
    anything heavy is imported.
    """

    def __init__(self, *args: Any, timm: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.timm = timm
        self.params += output.options()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = timm_flags.taken(args) if self.timm else args
        return super().parse_args(ctx, _joined(args, self.get_params(ctx)))

    def invoke(self, ctx: click.Context) -> Any:
        given = [ctx.params[name] for name in ("folder", "data") if ctx.params.get(name)]
        if len(given) == 1:  # two are refused by the command
            early.refuse_missing(given[0])
        with output.json_alone(ctx):
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                section = getattr(param, "section", None)
                groups.setdefault(_TITLES[section] if section else "Options", []).append(record)
        for title in ["Options", *_TITLES.values()]:
            if title in groups:
                with formatter.section(title):
                    formatter.write_dl(groups[title], col_max=32)


def _joined(words: list[str], params: list[click.Parameter]) -> list[str]:
    """Words in which numbers after a flag that takes a list are one word, with commas, and pairs have a flag each."""
    by_flag = {flag: param for param in params for flag in param.opts}
    joined: list[str] = []
    flag, further = "", None
    for word in words:
        if word in by_flag:
            flag, further = word, _further(by_flag[word])
        elif further and joined[-1] != flag and re.fullmatch(further, word):
            if further == _NUMBER:
                joined[-1] += f",{word}"
                continue
            joined.append(flag)
        elif joined and joined[-1] != flag:
            further = None
        joined.append(word)
    return joined


_NUMBER, _PAIR = r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?,?", r"\w+=.*"


def _further(param: click.Parameter) -> str | None:
    """What the values of a list look like after its first; None for what has one value."""
    if isinstance(param.type, KeyValue):
        return _PAIR
    return _NUMBER if isinstance(param.type, CommaList) and param.type.element is not click.STRING else None


def recipe_option(argument: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with --recipe, its argument called so."""
    return click.option(
        "--recipe", "-c", "--config", argument, metavar="NAME|FILE", help="Start from this recipe.",
        shell_complete=completion.or_path(completion.complete_recipe),
    )  # fmt: skip


def settings(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with the options of whole sections (`train`) or of single settings (`data.data`)."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for field_name, (section, field) in reversed(flat_settings().items()):
            if section in names or f"{section}.{field_name}" in names:
                command = _option(section, field)(command)
        return command

    return decorate


def given() -> dict[str, Any]:
    """The settings that the user typed, by their bare names; what was left alone does not override a recipe."""
    context = click.get_current_context()
    typed = {
        name: value
        for name, value in context.params.items()
        if name in flat_settings() and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    return {name: dict(value) if isinstance(value, tuple) else value for name, value in typed.items()}


def _option(section: str, field: Field[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    kind = get_type_hints(get_type_hints(Recipe)[section])[field.name]
    flag = "--" + field.name.replace("_", "-")
    options: dict[str, Any] = {"help": _help(section, field), "default": None, "cls": Setting}
    options["shell_complete"] = completion.OF_SETTING.get(field.name)
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(argument for argument in get_args(kind) if argument is not type(None))
    if kind is bool:
        flag = flag if field.name.startswith("no_") else f"{flag}/--no-{flag[2:]}"
        options["is_flag"] = True
    elif get_origin(kind) is dict:
        options |= {"type": KeyValue(), "multiple": True}
    elif get_origin(kind) is list:
        options["type"] = CommaList(_scalar(get_args(kind)[0]))
    else:
        choices = limits(field).choices
        options["type"] = click.Choice(choices) if choices else _scalar(kind)
    decorator = click.option(flag, *field.metadata["flags"], field.name, **options)

    def place(command: Callable[..., Any]) -> Callable[..., Any]:
        decorated = decorator(command)
        decorated.__click_params__[-1].section = section  # type: ignore[attr-defined]
        return decorated

    return place


def _scalar(kind: Any) -> click.ParamType:
    kinds: dict[Any, click.ParamType] = {int: click.INT, float: click.FLOAT}
    return kinds.get(kind, click.STRING)


def _help(section: str, field: Field[Any]) -> str:
    default = getattr(getattr(Recipe(), section), field.name)
    if isinstance(default, list):
        default = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
    shown = "on" if default is True else default
    return f"{field.metadata['help']}  [{shown}]" if shown not in (None, "", False, {}) else field.metadata["help"]
