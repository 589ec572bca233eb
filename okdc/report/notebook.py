"""What a notebook shows of a run or a comparison: a few rows, and the curves as the report draws them."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from okdc import tasks
from okdc.report import comparison, report
from okdc.report.rendering import environment, plain
from okdc.report.words import percent, signed

ROW, REST = 36, 70  # pixels: a row of the table, and what is around it


def of_run(folder: Path) -> str | None:
    """The run in `folder` as HTML with a style of its own; None where there is no report yet."""
    file = folder / "report.json"
    if not file.is_file():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    metrics, verification = facts["metrics"], facts.get("verification")
    metric = tasks.get(facts.get("task") or tasks.DEFAULT).metric
    rows = [
        ("method", facts["method"]["name"]),
        ("student", percent(metrics.get(metric))),
        ("ensemble", percent(metrics.get(f"ensemble_{metric}"))),
        ("epoch that ships", metrics.get("best_epoch")),
        ("verification", verification["verdict"].replace("_", " ") if verification else "nothing was exported"),
        ("report", str(folder / "report.html")),
    ]
    view = report.view(folder, facts)
    return _framed(view["headline"], [row for row in rows if row != ("ensemble", percent(None))], view["accuracy"])


def of_comparison(facts: dict[str, Any]) -> str:
    """A comparison, by its facts, likewise."""
    view = comparison.view(plain(facts))
    rows = [("arm", view["metric"], "over plain", "with as much compute")]
    for line in view["lines"]:
        gains = [signed((line[kind] or {}).get("mean")) for kind in ("gain", "equal")]
        rows.append((line["name"], percent((line["spread"] or {}).get("mean"), 2), *gains))
    return _framed(view["verdict"], rows, view["curves"])


def _framed(headline: str, rows: Sequence[tuple[Any, ...]], chart: dict[str, Any] | None) -> str:
    """A page in a frame, so that its style is not the notebook's."""
    template = environment().get_template("notebook.html.j2")
    page = template.render(headline=headline, rows=rows, chart=chart, hues=report.HUES)
    height = REST + ROW * len(rows) + (chart["height"] + REST if chart else 0)
    named = f'title="{html.escape(headline)}" srcdoc="{html.escape(page)}"'
    return f'<iframe {named} width="100%" height="{height}" style="border: 0"></iframe>'
