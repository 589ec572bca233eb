"""What a checkpoint takes: bytes of what ships and of what resumes, seconds to save, memory to go on from it.

    python tests/scale/checkpoints.py [ROWS ...]

A bank of so many rows x 128 x 4 bytes for each of two members. Memory is the process's own; what is mapped from a file
is the system's to take back.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from okdc.cohort import CohortOutput
from okdc.training import checkpoint
from tests.helpers.training import SETTINGS, Tiny, run
from tests.scale.measuring import cost, table


class Remembering(Tiny):
    """Has a bank, as mcl and mcl_okd have."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(2, rows, 128))

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        return super().losses(out, labels)


def row(rows: int) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        last, best = (Path(folder) / name for name in (checkpoint.LAST, checkpoint.BEST))
        run(Path(folder), method=Remembering(rows))
        saving = cost(lambda: run(Path(folder) / "again", method=Remembering(rows)), n=1)
        method = Remembering(rows)
        resuming = cost(lambda: run(Path(folder), method=method, resume=last), n=1)
        reading = cost(lambda: checkpoint.load(best)["state_dict"], n=1)
        sizes = (f"{path.stat().st_size / 2**20:.1f}" for path in (last, best))
        return (
            f"{rows:,}", f"{method.bank.nbytes / 2**20:.0f}", *sizes, f"{saving.seconds:.2f}",
            f"{resuming.seconds:.2f}", f"{resuming.megabytes:.0f}", f"{reading.megabytes:.0f}",
        )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert SETTINGS.epochs == 3
    head = ("rows", "banks MB", "last MB", "best MB", "3 epochs CPU s", "resume CPU s", "resume MB", "read best MB")
    table(head, map(row, map(int, sys.argv[1:] or (10_000, 100_000, 1_281_167))))
