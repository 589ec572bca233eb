"""A long run's files: summary.csv, which is written anew after each epoch, and the report at the end.

    python tests/scale/long.py [EPOCHS ...]

Eight members and 40 loss parts; the rows are made up, nothing is trained.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from okdc import report
from okdc.training.progress import write_summary
from tests.report.test_report import sample
from tests.scale.measuring import cost, table

MEMBERS, LOSSES = 8, 40


def history(epochs: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    names = ["target", *(f"branch{i}" for i in range(1, MEMBERS)), "ensemble"]
    columns = ["train_loss", "eval_loss", "eval_top1", "eval_top5", "eval_balanced", "lr"]
    columns += [f"loss/part{i}" for i in range(LOSSES)] + [f"top1/{name}" for name in names]
    columns += ["seconds", "images_per_second", "data_wait"]
    return [
        {"epoch": epoch, **{name: 100 * draw.random() for name in columns}, "skipped_steps": 0}
        for epoch in range(epochs)
    ]


def row(epochs: int) -> tuple[str, ...]:
    rows, facts = history(epochs), sample()
    facts["history"] = rows
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        summary = cost(lambda: write_summary(folder / "summary.csv", rows), n=3)
        pages = cost(lambda: report.write(folder, facts), n=3)
        sizes = [
            f"{(folder / each).stat().st_size / 2**20:.2f}" for each in ("summary.csv", "report.html", "report.json")
        ]
    return f"{epochs:,}", f"{1000 * summary.seconds:.1f}", f"{pages.seconds:.2f}", *sizes


if __name__ == "__main__":
    head = ("epochs", "summary.csv CPU ms", "report CPU s", "summary.csv MB", "report.html MB", "report.json MB")
    table(head, map(row, map(int, sys.argv[1:] or (3, 30, 300))))
