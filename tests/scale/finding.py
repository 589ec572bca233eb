"""What it takes to find the images of a folder, and to be told of them by another rank instead.

    python tests/scale/finding.py [IMAGES ...]

Files are hard links of empty ones; 14 million are not made, but their list is.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from pathlib import Path

from okdc.data.folders import _open
from okdc.data.scan import Files
from tests.scale.measuring import cost, table


def fill(folder: Path, images: int, classes: int) -> None:
    (first := folder.parent / "first").touch()
    for number in range(classes):
        place, name = folder / f"n{number:08}", f"n{number:08}"
        place.mkdir(parents=True)
        for each in range(images // classes):
            if each % 10_000 == 0:  # a file has so many names at most, on most file systems
                (first := folder.parent / f"first{number}.{each}").touch()
            os.link(first, place / f"{name}_{each}.JPEG")


def listed(images: int) -> Files:
    paths = [f"n{each % 1000:08}/n{each % 1000:08}_{each}.JPEG" for each in range(images)]
    return Files(Path("/imagenet/train"), paths, [each % 1000 for each in range(images)])


def row(images: int) -> tuple[str, ...]:
    found = "not made"
    if images < 14_000_000:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            fill(Path(folder) / "train", images, min(1000, images // 10))
            found = f"{cost(lambda: _open(Path(folder) / 'train', None, settled=True), n=1).seconds:.2f}"
    files = listed(images)
    sent = pickle.dumps(files)
    packed, read = cost(lambda: pickle.dumps(files), n=1).seconds, cost(lambda: pickle.loads(sent), n=1).seconds
    return f"{images:,}", found, f"{packed:.2f}", f"{read:.2f}", f"{len(sent) / 2**20:.0f}"


if __name__ == "__main__":
    head = ("images", "find, CPU s", "pack, CPU s", "unpack, CPU s", "MB sent")
    table(head, map(row, map(int, sys.argv[1:] or (10_000, 100_000, 1_281_000, 14_000_000))))
