"""What memory banks take on each device, and a step's draw, contrast and update, in float32 and in half precision.

    python tests/scale/banks.py [IMAGES ...]

Batch 64, two networks, width 128: `mcl` against 8,192 negatives, `mcl_okd` against 256. Then how far the losses of a
training on digits differ, from equal weights, rows and draws, beside those of another seed.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from okdc.losses import all_memory_scores, nce
from okdc.methods.shared.contrast import Bank, mutual_contrast
from tests.scale.measuring import cost, table

DTYPES = ("float32", "float16")


def losses(bank: Bank, units: list[Tensor], indices: Tensor) -> dict[str, Tensor]:
    """The contrast of mcl and of mcl_okd with what is drawn for images (B,); the bank moves."""
    rows = bank.gather(bank.draw(indices))
    terms = mutual_contrast([x[None] for x in units], indices, rows, tau=0.1, temperature=3.0)
    noise = [torch.cat([x[:, :1], x[:, 2:]], 1) for x in rows]
    scores = all_memory_scores([(noise[1], units[0]), (noise[0], units[1])], 0.1)
    bank.update(indices, units)
    return terms._asdict() | {"nce": torch.stack([nce(x, len(bank.order)) for x in scores]).sum()}


def step(images: int, negatives: int, dtype: str) -> tuple[str, ...]:
    labels = torch.arange(images) % 1000
    bank = Bank(labels, 2, 128, negatives, 0.5, dtype=dtype)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    units = [F.normalize(torch.randn(64, 128, generator=draw)).requires_grad_() for _ in range(2)]

    def work() -> None:
        indices = torch.randint(images, (64,), generator=draw)
        torch.stack(list(losses(bank, units, indices).values())).sum().backward()

    used = cost(work, n=5)
    size = f"{bank.rows.nbytes / 2**20:,.0f}"
    return f"{images:,}", f"{negatives:,}", dtype, size, f"{1000 * used.seconds:.0f}", f"{used.megabytes:.0f}"


def trained(dtype: str, seed: int, steps: int = 200) -> dict[str, float]:
    """The mean of each loss over the last 50 steps."""
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(seed)
    networks = [nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128)) for _ in range(2)]
    bank = Bank(labels, 2, 128, 64, 0.5, dtype=dtype)  # type: ignore[arg-type]
    bank.rows.copy_(torch.rand(bank.rows.shape) - 0.5)
    optimizer = torch.optim.SGD([p for each in networks for p in each.parameters()], lr=0.05, momentum=0.9)
    told = []
    for _ in range(steps):
        indices = torch.randint(len(labels), (64,))
        parts = losses(bank, [F.normalize(each(images[indices])) for each in networks], indices)
        optimizer.zero_grad()
        (0.1 * torch.stack(list(parts.values())).sum()).backward()
        optimizer.step()
        told.append({name: value.item() for name, value in parts.items()})
    return {name: sum(each[name] for each in told[-50:]) / 50 for name in told[0]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sizes = [int(each) for each in sys.argv[1:]] or [100_000, 1_281_167]
    head = ("images", "negatives", "bank_dtype", "banks MB", "CPU ms a step", "MB a step")
    table(head, (step(size, k, dtype) for size in sizes for k in (8192, 256) for dtype in DTYPES))
    full, half, other = trained("float32", 0), trained("float16", 0), trained("float32", 1)
    head = ("loss, mean of the last 50 of 200 steps", "float32", "float16", "float32, another seed")
    table(head, ((n, *(f"{each[n]:.4f}" for each in (full, half, other))) for n in full))
