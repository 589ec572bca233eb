"""Templates filled in and written, plain values as JSON beside them: all of a report or nothing of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from okdc.report.words import DASH, FILTERS
from okdc.system import files

HUES = 6  # muted colours of style.css.j2: .hue0 to .hue5


def environment() -> Any:
    """The templates beside this file, which show a dash for what is not there."""
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=ChainableUndefined,
        finalize=lambda value: DASH if value is None or isinstance(value, ChainableUndefined) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= FILTERS
    return found


def write_all(folder: Path, name: str, facts: dict[str, Any], view: dict[str, Any]) -> Path:
    """Write NAME.json (the facts), NAME.md and NAME.html into `folder`, each atomically; returns the html."""
    templates = environment()
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        f"{name}.json": json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n",
        f"{name}.md": templates.get_template(f"{name}.md.j2").render(view),
        f"{name}.html": templates.get_template(f"{name}.html.j2").render(view),
    }
    for file, text in texts.items():  # all three are rendered before the first is written
        files.atomically(folder / file, partial(Path.write_text, data=text, encoding="utf-8"))
    return folder / f"{name}.html"


def plain(value: Any) -> Any:
    """`value` in the types of JSON: non-finite numbers become None, arrays lists, anything else its text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)
