"""Write okdc/__init__.pyi, in which every setting is a typed keyword: `python -m tests.stub`."""

from __future__ import annotations

import inspect
from dataclasses import Field
from importlib import import_module
from pathlib import Path
from typing import Any

import okdc
from okdc.recipe import flat_settings
from okdc.recipe.strict import limits

STUB = Path(okdc.__file__).with_suffix(".pyi")
FUNCTIONS = ("compress", "compare", "export")
HEAD = '''"""The public surface with every setting as a keyword; made by `python -m tests.stub`, from the settings."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

'''


def text() -> str:
    """The stub of what okdc is now."""
    public = {name: place for name, place in okdc._PUBLIC.items() if name not in FUNCTIONS}
    lines = [f"from {place} import {name} as {name}" for place, name in sorted((v, k) for k, v in public.items())]
    lines += ["from okdc.verification.schema import Verification", "", "__version__: str", ""]
    return HEAD + "\n".join([*lines, *map(_function, FUNCTIONS)]) + "\n"


def _function(name: str) -> str:
    """A function's signature with the settings in place of `**settings`, those that it names itself left out."""
    found = inspect.signature(getattr(import_module(okdc._PUBLIC[name]), name))
    own = [p for p in found.parameters.values() if p.kind is not p.VAR_KEYWORD]
    # A bundle is made of finished weights: of the other sections it takes the data's alone.
    sections = ("export", "data") if name == "export" else ("network", "cohort", "data", "train", "export")
    lines, starred = [], False
    for parameter in own:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("*,")
            starred = True
        default = "" if parameter.default is parameter.empty else " = ..."
        lines.append(f"{parameter.name}: {parameter.annotation}{default},")
    taken = {parameter.name for parameter in own}
    if name != "export":
        lines.append("method_kwargs: dict[str, Any] | None = ...,")
    lines += [
        f"{key}: {_type(field)} = ...,"
        for key, (section, field) in flat_settings().items()
        if section in sections and key not in taken
    ]
    body = "\n".join(f"    {line}" for line in lines)
    return f"def {name}(\n{body}\n) -> {found.return_annotation}: ..."


def _type(field: Field[Any]) -> str:
    """The type of a setting, where it has choices these."""
    choices = limits(field).choices
    return str(field.type).replace("str", f"Literal{list(choices)}".replace("'", '"')) if choices else str(field.type)


if __name__ == "__main__":
    STUB.write_text(text(), encoding="utf-8")
