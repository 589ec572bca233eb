"""What images that are kept decoded take to begin with and to train on, and what validation does where training is not.

    python tests/scale/keeping.py

Of the size of Tiny-ImageNet's, 64 x 64, in a table of arrays: how many are kept by themselves. Then 10,000 validation
images beside training images that --aa lets nobody keep. Then random resized crops and flips of batches of 128.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from okdc.data import load, open_source
from okdc.data.batchwise import Law
from okdc.data.resident import _room
from okdc.recipe import DataSettings
from tests.scale.measuring import cost, table

CONFIG = {
    "input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.25,) * 3,
    "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip


def folder_of(folder: Path, training: int, validation: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    first = folder / "first.jpg"
    Image.fromarray(pixels).resize((64, 64)).save(first)
    for split, count in (("train", training), ("val", validation)):
        for number in range(count):
            place = folder / split / f"{number % 10}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.jpg").hardlink_to(first)
    return folder


def begin(validation: int) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = str(folder_of(Path(folder), 200, validation))
        settings = DataSettings(data=path, workers=0, aa="rand-m9-mstd0.5")
        source = open_source(settings, 0)

        def start() -> None:
            load(source, settings, CONFIG, batch_size=64, validation_batch_size=64, seed=0, device="cpu")

        return f"{validation:,}", f"{cost(start, n=1).seconds:.2f}"


def crop(side: int, interpolation: str, batch: int = 128, batches: int = 10) -> tuple[str, ...]:
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8)
    law = Law((side, side), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation=interpolation, hflip=0.5)

    def work() -> None:
        for number in range(batches):
            law(images, torch.arange(batch) + batch * number)

    return f"{side} x {side}", interpolation, f"{batch * batches / cost(work, n=5).seconds:,.0f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    kept = _room(torch.device("cpu")) // (64 * 64 * 3)
    print(f"images of 64 x 64 pixels that are kept by themselves: up to {kept:,} (Tiny-ImageNet has 100,000)\n")
    table(("validation images", "load, CPU s"), map(begin, (1000, 10_000)))
    filters = ("bilinear", "bicubic")
    table(("images", "filter", "crops a CPU second"), (crop(side, each) for side in (32, 64) for each in filters))
