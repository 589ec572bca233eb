"""Images of more than 8 bits: how many of them are used is found, kept, and the same everywhere."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from okdc.data import Data, load, open_source
from okdc.data.transforms import convert
from okdc.errors import DataError
from okdc.recipe import DataSettings
from tests.helpers.images import CONFIG


def folder(root: Path, high: int, kind: str = "png", low: int = 0) -> Path:
    """Gradients from `low` to `high`, of 16 bits in PNG and of 32 in TIFF."""
    ramp = np.linspace(low, high, 256).reshape(16, 16).astype(np.uint16 if kind == "png" else np.int32)
    for split, count in (("train", 6), ("val", 3)):
        for number, cls in enumerate(("a", "b")):
            (root / split / cls).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(np.roll(ramp, number + i, 1)).save(root / split / cls / f"{i}.{kind}")
    return root


def loaded(root: Path, config: dict[str, Any] = CONFIG, **changes: Any) -> Data:
    given = replace(DataSettings(data=str(root), workers=0, no_aug=True), **changes)
    return load(open_source(given, 7), given, config, batch_size=6, validation_batch_size=6, seed=7, device="cpu")


def levels(batches: Any) -> torch.Tensor:
    return ((torch.cat([batch[0] for batch in batches]) * 0.25 + 0.5) * 255).round().unique()


@pytest.mark.parametrize("resident", ["auto", "off"])
@pytest.mark.parametrize(
    ("high", "kind", "bits"),
    [(65535, "png", 16), (4095, "png", 12), (1000, "png", 10), (255, "tif", 8), (16383, "tif", 14), (1, "tif", 1)],
)
def test_the_range_is_found_and_fills_the_greys(tmp_path: Path, high: int, kind: str, bits: int, resident: str) -> None:
    data = loaded(folder(tmp_path, high, kind), resident=resident)
    assert data.preprocess["pixel_bits"] == bits and not data.bad_images
    for batches in (data.train.batches(0), data.validation):
        grey = levels(batches)
        assert grey.max() >= 128 and grey.numel() >= min(high + 1, 200)
    assert len(list(data.validation_images or ())) == 6


def test_images_of_eight_bits_have_no_range_to_find(tmp_path: Path) -> None:
    for path in folder(tmp_path, 255).rglob("*.png"):
        Image.new("L", (16, 16), 99).save(path)
    assert "pixel_bits" not in loaded(tmp_path).preprocess


def test_the_range_is_stated_or_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path, 1000)
    assert loaded(tmp_path, pixel_bits=12).preprocess["pixel_bits"] == 12
    data = loaded(tmp_path, CONFIG | {"pixel_bits": 16})  # as the bundle says that is verified
    assert data.preprocess["pixel_bits"] == 16 and levels(data.validation).max() == 1000 >> 8
    assert "whole numbers" not in caplog.text
    loaded(tmp_path)
    assert "up to 1000: read as 10 bits (--pixel-bits" in caplog.text


def test_sixteen_bits_are_cut_as_they_were() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(np.asarray(convert(Image.fromarray(values), "L")), values >> 8)


def test_values_beyond_the_range_are_named_not_clipped(tmp_path: Path) -> None:
    folder(tmp_path, 4095)
    Image.fromarray(np.full((16, 16), 5000, np.uint16)).save(tmp_path / "val" / "a" / "1.png")
    Image.fromarray(np.full((16, 16), -1, np.int32)).save(tmp_path / "val" / "b" / "1.tif")
    data = loaded(tmp_path)
    assert sum(len(labels) for _, labels in data.validation or ()) == 5 == len(list(data.validation_images or ()))
    assert [reason.partition(": ")[2] for reason in data.bad_images.values()] == [
        "values from 5000 to 5000, and 0 to 4095 expected: --pixel-bits N",
        "values from -1 to -1, and 0 to 4095 expected: --pixel-bits N",
    ]


def test_a_deep_image_among_others_is_refused_as_long_as_nothing_is_stated(tmp_path: Path) -> None:
    for path in (folder(tmp_path, 255) / "train").rglob("*.png"):
        Image.new("L", (16, 16), 99).save(path)
    with pytest.raises(DataError, match=r"validation images.*--pixel-bits 16"):
        loaded(tmp_path)
    assert loaded(tmp_path, pixel_bits=8).preprocess["pixel_bits"] == 8


@pytest.mark.parametrize(("low", "high"), [(0, 100_000), (-1000, 3000)])
def test_ranges_that_nobody_knows_are_refused(tmp_path: Path, low: int, high: int) -> None:
    with pytest.raises(DataError, match=rf"whole numbers from {low} to {high}.*8 or 16 bits") as caught:
        loaded(folder(tmp_path, high, "tif", low))
    assert ("--pixel-bits 17" in str(caught.value)) == (low == 0)
    if low == 0:
        assert loaded(tmp_path, pixel_bits=17).preprocess["pixel_bits"] == 17


@pytest.mark.parametrize(("high", "refused"), [(4095, True), (65535, False)])
def test_dark_colours_of_sixteen_bits_are_refused(tmp_path: Path, high: int, refused: bool) -> None:
    for path in folder(tmp_path, 1).rglob("*.png"):
        path.write_bytes(colours(high))
    if refused:
        with pytest.raises(DataError, match=r"have 16 bits and use 12 of them at most.*65535"):
            loaded(tmp_path)
    else:
        assert "pixel_bits" not in loaded(tmp_path).preprocess


def colours(value: int) -> bytes:
    """A PNG of 16-bit RGB, which Pillow reads but cannot write."""
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    rows = (b"\0" + struct.pack(">H", value) * 48) * 16
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = [struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)
