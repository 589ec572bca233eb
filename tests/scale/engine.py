"""What okdc's training loop costs beside one written by hand: CPU microseconds a step of a tiny network.

    python tests/scale/engine.py [STEPS]

One thread, batches of 8 images of 8 x 8 pixels, SGD; from batches that are there, and from a DataLoader without
workers, which okdc takes as one's own. Loops are measured in turn; their first 100 steps do not count.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from okdc import build
from okdc.data import wrap
from tests.helpers.training import BATCH, CLASSES, SETTINGS, Batches, network, run
from tests.scale.measuring import table

FIRST, ROUNDS = 100, 5
STEP = replace(SETTINGS, epochs=1, momentum=0.9, log_interval=50)


class Clocked:
    """Batches that note when each is asked for."""

    def __init__(self, batches: Callable[[], Iterable[Any]], steps: int) -> None:
        self.made, self.steps, self.times = batches, steps, list[float]()

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        batches = iter(self.made())
        for _ in range(self.steps):
            self.times.append(time.process_time())
            yield next(batches)

    @property
    def microseconds(self) -> float:
        return 1e6 * (self.times[-1] - self.times[FIRST]) / (self.steps - 1 - FIRST)


def by_hand(clocked: Clocked) -> float:
    net = network().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True, fused=True)
    for images, labels in clocked.batches(0):
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return clocked.microseconds


def by_okdc(clocked: Clocked) -> float:
    method = build(network(), torch.randn(2, 3, 8, 8), "baseline")
    data: Any = SimpleNamespace(train=clocked, validation=None, held_out=None)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        run(Path(folder), STEP, method=method, data=data)
    return clocked.microseconds


def ways(images: Tensor, labels: Tensor, steps: int) -> dict[tuple[str, str], Callable[[], float]]:
    there = Batches(images, labels)
    loader = DataLoader(TensorDataset(images, labels), BATCH, shuffle=True)
    with redirect_stderr(StringIO()):
        own = wrap(loader, num_classes=CLASSES).train
    return {
        ("batches that are there", "by hand"): lambda: by_hand(Clocked(lambda: there.batches(0), steps)),
        ("batches that are there", "okdc"): lambda: by_okdc(Clocked(lambda: there.batches(0), steps)),
        ("a DataLoader", "by hand"): lambda: by_hand(Clocked(lambda: loader, steps)),
        ("a DataLoader", "okdc"): lambda: by_okdc(Clocked(lambda: own.batches(0), steps)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = int(sys.argv[1]) if sys.argv[1:] else 2000
    labels = torch.arange(BATCH * steps) % CLASSES
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for way, measure in ways(torch.randn(len(labels), 3, 8, 8), labels, steps).items():
            found.setdefault(way, []).append(measure())
    head = ("images from", "loop", f"CPU µs a step, median of {ROUNDS}", "least", "most")
    table(head, ((*way, *(f"{f(each):.0f}" for f in (median, min, max))) for way, each in found.items()))
