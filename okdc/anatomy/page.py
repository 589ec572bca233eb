"""What a notebook shows of an anatomy: its stages and cuts, as two small tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from okdc.anatomy.anatomy import Anatomy, Cut


def page(anatomy: Anatomy, choices: Sequence[Cut], default: str) -> str:
    """The anatomy as HTML; `choices` are the cuts to show, of which one is the `default`."""
    stages = [(i, stage.last, stage.size, len(stage.blocks)) for i, stage in enumerate(anatomy.stages, 1)]
    cuts = [
        (cut.name, "x".join(map(str, cut.shape)), f"{cut.flops_after:.0%}", "default" * (cut.name == default))
        for cut in choices
    ]
    parts = [f"<p>{escape(repr(anatomy).strip('<>'))}</p>"]
    if stages:
        parts.append(_table("Stages", ("stage", "ends with", "size", "blocks"), stages))
    if cuts:
        parts.append(_table("Where branches can part", ("cut after", "shape", "FLOPs after", ""), cuts))
    return "".join(parts)


def _table(caption: str, head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{caption}</caption><tr>{columns}</tr>{body}</table>"
