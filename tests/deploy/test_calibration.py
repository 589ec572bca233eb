"""Training images for int8 that are validation images too are known by their files, and none of these is decoded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from okdc.data import load, open_source
from okdc.deploy import calibration
from okdc.recipe import DataSettings

CONFIG = {
    "input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3,
    "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip


def test_copies_of_validated_files_are_left_out_without_decoding_any(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        for split in ("train", "val"):
            (tmp_path / split / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(tmp_path / "train" / "ab"[number % 2] / f"{number}.bmp")  # all of one size
    for number in (1, 2, 5):
        shutil.copy(tmp_path / "train" / "ab"[number % 2] / f"{number}.bmp", tmp_path / "val" / "ab"[number % 2])
    settings = DataSettings(data=str(tmp_path), workers=0, resident="off")
    source = open_source(settings, 0)
    data = load(source, settings, CONFIG, batch_size=2, validation_batch_size=2, seed=0, device="cpu")
    for file in (tmp_path / "val").rglob("1.bmp"):  # not one that could be decoded any more
        file.write_bytes(file.read_bytes()[:20].ljust(file.stat().st_size))
    images, facts = calibration.draw(data, 10)
    assert len(images) == 6 and facts["also_validated"] == 2
