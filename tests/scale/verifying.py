"""What a verification takes beside plain inference on the same images, and a tally at many classes.

    python tests/scale/verifying.py [IMAGES ...]

Photos of 500 x 375 pixels, hard links of a hundred; a network that takes next to no time, so that reading shows; one
file in ONNX's place, and predict.py's own preprocessing of raw images. int8's check for duplicates is of 300 images.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from okdc.data import Data, load, open_source
from okdc.deploy import calibration
from okdc.recipe import DataSettings
from okdc.system import shipped
from okdc.tasks.shared.class_scores import ClassTally
from okdc.verification import Exported, compare, torch_runner
from tests.scale.measuring import cost, table

CONFIG = {
    "input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.25,) * 3,
    "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
}  # fmt: skip


def photos(folder: Path, images: int) -> Data:
    """`images` to validate on and 400 to train on, of 20 classes."""
    random, first = np.random.default_rng(0), []
    for number in range(100):
        small = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        first.append(folder / f"{number}.jpg")
        Image.fromarray(small).resize((500, 375 + number % 7)).save(first[-1], quality=90)
    for split, count, start in (("train", 400, 0), ("val", images, 50)):
        for number in range(count):
            place = folder / split / f"{number % 20:02}"
            place.mkdir(parents=True, exist_ok=True)
            os.link(first[start + number % 50], place / f"{number}.jpg")
    settings = DataSettings(data=str(folder), workers=0, resident="off")
    source = open_source(settings, 0)
    return load(source, settings, CONFIG, batch_size=64, validation_batch_size=64, seed=0, device="cpu")


def row(images: int) -> tuple[str, ...]:
    student = nn.Sequential(nn.AvgPool2d(56), nn.Flatten(), nn.Linear(48, 20)).eval()
    predict, run = shipped.load(shipped.folder("export") / "predict.py"), torch_runner(student)
    module: Any = SimpleNamespace(runner=lambda path, device: run)
    file = Exported(Path(__file__), module)

    def pipeline(raw: Any) -> np.ndarray:
        return run(np.stack([predict.preprocess(image, CONFIG) for image in raw]))

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        data = photos(Path(folder), images)
        plain = cost(lambda: [run(batch.numpy()) for batch, _ in data.validation], n=1)

        def verify() -> None:
            compare(
                student, {"onnx": file}, data, input_size=CONFIG["input_size"], batch_sizes=(),
                pipelines={"predict.py": pipeline},
            )  # fmt: skip

        verified, drawn = cost(verify, n=1), cost(lambda: calibration.draw(data, 300), n=1)
    each = (f"{1000 * used.seconds / images:.2f}" for used in (plain, verified))
    return f"{images:,}", *each, f"{verified.seconds / plain.seconds:.2f}", f"{drawn.seconds:.2f}"


def tally(classes: int) -> tuple[str, ...]:
    out = np.random.default_rng(0).standard_normal((64, classes)).astype(np.float32)
    labels = np.arange(64) % classes

    def count() -> None:
        found = ClassTally()
        found.score(out, labels)
        found.agreement(out, out, 1e-4)

    return f"{classes:,}", f"{1000 * cost(count, n=5).seconds / 64:.3f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    head = ("validation images", "plain, CPU ms an image", "verified", "ratio", "int8's images, CPU s")
    table(head, map(row, map(int, sys.argv[1:] or (1000, 4000, 10_000))))
    table(("classes", "tally, CPU ms an image"), map(tally, (1000, 21_841)))
