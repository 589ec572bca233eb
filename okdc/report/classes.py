"""What the report says of single classes: which are recognised, which are taken for which; in words and a picture."""

from __future__ import annotations

from typing import Any

from okdc.report.plots import heat

WORST = 5  # classes named in words


def view(confusion: dict[str, Any] | None) -> dict[str, Any] | None:
    """The classes of a run as the templates show them, worst first; None where nothing was counted."""
    if not confusion:
        return None
    seen = [each for each in confusion["classes"] if each["images"]]
    pairs = confusion.get("pairs") or []
    rows = sorted(({**each, "taken_for": _taken_for(each["name"], pairs)} for each in seen), key=_recall)
    worst = [row for row in rows if row["recall"] < 100]
    table = confusion.get("table")
    return {
        "rows": rows,
        "worst": worst[:WORST],
        "more": max(0, len(worst) - WORST),
        "pairs": pairs,
        "always": confusion.get("always") if len(seen) > 1 else None,
        "unseen": [each["name"] for each in confusion["classes"] if not each["images"]],
        "heat": heat(table, [each["name"] for each in confusion["classes"]]) if table else None,
    }


def _recall(row: dict[str, Any]) -> tuple[float, int]:
    """The order of classes: the worst first, of equals the one with more images."""
    return row["recall"], -row["images"]


def _taken_for(name: str, pairs: list[dict[str, Any]]) -> str | None:
    return next((pair["named"] for pair in pairs if pair["true"] == name), None)
