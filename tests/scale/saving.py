"""How long training waits for a save: seconds between the last validation batch of an epoch and the next step.

    python tests/scale/saving.py [ROWS ...]

A bank of so many rows x 128 x 4 bytes for each of two members. A step takes 1 s, in which nothing is computed, as
beside a GPU. Files are written to the folder that it is started in.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from tests.helpers.training import SETTINGS, STEPS, run, tiny_data
from tests.scale.checkpoints import Remembering
from tests.scale.measuring import cost, table

EPOCHS, STEP = 4, 1.0


class Timed(list):
    """Validation batches; notes when the last one has come."""

    def __iter__(self):
        yield from super().__iter__()
        self.over = time.perf_counter()


def train(rows: int, folder: Path) -> tuple[float, float]:
    """Seconds that training waited between two epochs, the median, and that the run took."""
    waits: list[float] = []

    def before(epoch: int, index: int) -> None:
        if epoch and not index:
            waits.append(time.perf_counter() - data.validation.over)
        time.sleep(STEP)

    data = tiny_data(before)
    data.validation, start = Timed(data.validation), time.perf_counter()
    run(folder, replace(SETTINGS, epochs=EPOCHS), method=Remembering(rows), data=data)
    return median(waits), time.perf_counter() - start


def row(rows: int) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        times = Path(folder, "times")

        def work() -> None:
            times.write_text(json.dumps(train(rows, Path(folder))))

        memory = cost(work, n=1).megabytes
        wait, whole = json.loads(times.read_text())
    banks, steps = 2 * rows * 128 * 4 / 2**20, EPOCHS * STEPS * STEP
    return f"{rows:,}", f"{banks:.0f}", f"{wait:.2f}", f"{whole:.1f}", f"{steps:.1f}", f"{memory:.0f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    head = ("rows", "banks MB", "waits s", f"{EPOCHS} epochs s", "of that steps s", "memory MB")
    table(head, map(row, map(int, sys.argv[1:] or (10_000, 100_000, 1_281_167))))
