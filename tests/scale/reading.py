"""What a resumed run reads of a stream before its first batch, and what ranks read of a loader of one's own.

    python tests/scale/reading.py [IMAGES [loader]]

Photos of 500 x 375 pixels, one of a hundred again and again, in four shards; batches of 64. CPU seconds of a process
and its data workers, of which a stream has two and the loader none. Ranks are played one after another, not at once.
The loader has a quarter of the images, and with `loader`, which leaves streams out, all of them too.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import FakeData

from okdc.data import load, open_source, wrap
from okdc.recipe import DataSettings
from tests.scale.measuring import cost, table
from tests.scale.verifying import CONFIG

BATCH = 64


def write(folder: Path, images: int) -> DataSettings:
    random, photos = np.random.default_rng(0), []
    for _ in range(100):
        file = io.BytesIO()
        small = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(small).resize((500, 375)).save(file, "jpeg", quality=90)
        photos.append(file.getvalue())
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as file:
            for i in range(images // 4):
                for name, content in ((f"{i}.jpg", photos[i % 100]), (f"{i}.cls", str(i % 2).encode())):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    file.addfile(header, io.BytesIO(content))
    (folder / "classes.txt").write_text("cat\ndog\n")
    return DataSettings(
        data=f"wds/{folder}", class_map=str(folder / "classes.txt"), workers=2,
        train_split=f"{{0..3}}.tar|{images}", val_split="0.tar|64",
    )  # fmt: skip


def resuming(settings: DataSettings, start: int) -> tuple[str, ...]:
    def begin() -> None:
        data = load(
            open_source(settings, 0), settings, CONFIG, batch_size=BATCH, validation_batch_size=BATCH, seed=0,
            device="cpu",
        )  # fmt: skip
        next(data.train.batches(0, start))

    return f"{start}", f"{cost(begin, n=1).seconds:.2f}"


class Counted(FakeData):
    """Made-up images that count how many of them were made, by whatever process."""

    def __init__(self, images: int) -> None:
        transform = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor()])
        super().__init__(images, (3, 375, 500), 2, transform)
        self.made = torch.zeros((), dtype=torch.int64).share_memory_()

    def __getitem__(self, index: int) -> Any:
        self.made += 1
        return super().__getitem__(index)


def reading(images: int, world: int) -> tuple[str, ...]:
    def epoch(rank: int) -> tuple[float, float]:
        data = Counted(images)
        train = wrap(DataLoader(data, BATCH, shuffle=True), num_classes=2, rank=rank, world=world).train
        data.made.zero_()  # the first batch has been looked at
        return cost(lambda: [None for _ in train.batches(0)], n=1).seconds, data.made.item()

    seconds, made = map(max, zip(*map(epoch, range(min(2, world)))))
    return f"{world}", f"{images:,}", f"{made:,.0f}", f"{seconds:.1f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    whole = int(sys.argv[1]) if sys.argv[1:] else 6400
    if sys.argv[2:] != ["loader"]:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            given = write(Path(folder), whole)
            steps = (step for step in (0, 10, 30, 90) if BATCH * (step + 4) <= whole)
            table(("steps done", "until the next batch, CPU s"), (resuming(given, step) for step in steps))
    head = ("ranks", "images", "own loader: decoded by a rank in an epoch", "CPU s a rank and epoch")
    sizes = (1, 4) if sys.argv[2:] else (4,)
    table(head, (reading(whole // size, world) for size in sizes[::-1] for world in (1, 2, 4)))
