"""What an epoch's order of pairs costs, and a step's draw of a memory bank's negatives, as images become more.

    python tests/scale/orders.py

It names nothing that is newer than the measurement, so that it runs on older code too: PYTHONPATH=OLDER_CHECKOUT.
"""

from __future__ import annotations

import torch

from okdc.data.pairs import images_per_class, paired_order
from okdc.methods.shared.contrast import Bank
from tests.scale.measuring import cost, table

SIZES = ((10_000, 100), (100_000, 1000), (1_281_167, 1000), (14_000_000, 21_841))


def pairs(images: int, classes: int) -> tuple[str, ...]:
    labels = torch.randint(classes, (images,), generator=torch.Generator().manual_seed(0))
    count = images_per_class(labels, 256)
    used = cost(lambda: paired_order(labels, 256, count, torch.Generator().manual_seed(1)), n=1)
    return f"{images:,}", f"{used.seconds:.3f}", f"{used.megabytes:.0f}"


def draw(images: int, classes: int, batch: int = 64, negatives: int = 256) -> tuple[str, ...]:
    labels = torch.randint(classes, (images,), generator=torch.Generator().manual_seed(0))
    bank = Bank(labels, 1, 1, negatives, 0.5, replacement=False)
    used = cost(lambda: bank.draw(torch.arange(batch)), n=3)
    return f"{images:,}", f"{1000 * used.seconds:.2f}", f"{used.megabytes:.0f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    table(("images", "pairs, CPU s an epoch", "peak MB"), (pairs(*size) for size in SIZES))
    table(("images", "draw, CPU ms a step of 64", "peak MB"), (draw(*size) for size in SIZES[:3]))
