"""What the site reads off the code when it is built: the settings, and the cards of the methods."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any, get_type_hints

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from okdc import methods
from okdc.recipe import Recipe
from okdc.recipe.strict import limits


class Settings(SphinxDirective):
    """```{okdc-settings} SECTION```: every setting of a section, its flag, its kind, its default and its limits."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        kind = get_type_hints(Recipe)[self.arguments[0]]
        rows = ["| setting | default | what it does |", "|---|---|---|", *map(_row, fields(kind))]
        return self.parse_text_to_nodes("\n".join(rows))


class Cards(SphinxDirective):
    """```{okdc-cards}```: a section for each method, its card and its settings."""

    def run(self) -> list[nodes.Node]:
        text = "\n\n".join(f"## {name}\n\n{_card(name)}" for name in methods.names())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _row(setting: Any) -> str:
    others = "".join(f", `{flag}`" for flag in setting.metadata["flags"])
    flag = "--" + setting.name.replace("_", "-")
    default = setting.default_factory() if setting.default is MISSING else setting.default
    shown = "" if default in (None, "", {}, []) else f"`{_value(default)}`"
    words = f"{setting.metadata['help']}{_bounds(limits(setting))}".replace("|", r"\|").replace("<", r"\<")
    return f"| `{flag}`{others} | {shown} | {words} |"


def _value(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list):
        return ",".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _bounds(allowed: Any) -> str:
    """What a value must be, after its help; nothing where anything goes."""
    said = [f"one of {', '.join(f'`{each}`' for each in allowed.choices)}"] if allowed.choices else []
    for words, bound in (("above", allowed.above), ("at least", allowed.at_least), ("at most", allowed.at_most)):
        said += [] if bound is None else [f"{words} {bound:g}"]
    return f" ({', '.join(said)})" if said else ""


def _card(name: str) -> str:
    """The card as Markdown: what is needed of it in bold, and the settings with their defaults below."""
    text = re.sub(r"(?m)^(Paper|Code|Differs|Costs): ", r"\n**\1:** ", methods.card(name))
    text = re.sub(r"(?m)^ +", "", text).replace("_", r"\_").replace("*(", r"\*(")
    parameters = methods.settings(name).parameters.values()
    listed = [f"| `{p.name}` | `{p.default}` | `{inspect.formatannotation(p.annotation)}` |" for p in parameters]
    table = "\n".join(
        ["| setting | default | kind |", "|---|---|---|", *(each.replace(" | None`", r" \| None`") for each in listed)]
    )
    return f"{text}\n\n{table}" if listed else text


def mark_parameters(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings say `model, loader: what they are` on lines of their own: a list."""
    try:
        known = set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return
    marked: list[str] = []
    within = False
    for line in lines:
        names, colon, text = line.partition(": ")
        if colon and known.issuperset(names.split(", ")):
            marked += [] if within else [""]
            marked.append(f"- **{names}**: {text}")
            within = True
        else:
            within = within and bool(line)
            marked.append(f"  {line}" if within else line)
    lines[:] = marked


def mark_examples(app: Sphinx, context: click.Context, lines: list[str]) -> None:
    """The examples of a command's help, which sphinx-click gives as lines of text, as code."""
    marked: list[str] = []
    for before, line in pairwise(["", *lines]):
        example = line.startswith("| ")
        marked += ["::", ""] if example and not before.startswith("| ") else []
        marked.append(f"    {line[2:]}" if example else line)
    lines[:] = marked


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("okdc-settings", Settings)
    app.add_directive("okdc-cards", Cards)
    app.connect("autodoc-process-docstring", mark_parameters)
    app.connect("sphinx-click-process-description", mark_examples)
    return {"parallel_read_safe": True}
