"""Images of every mode and depth, and those that cannot be read: named, counted, replaced or left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from okdc.errors import DataError
from tests.helpers.images import CONFIG, corrupt, loaded, same, settings, write


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_become_what_the_network_takes(tmp_path: Path, channels: int) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            for mode, kind in (
                ("L", "png"),
                ("CMYK", "jpg"),
                ("P", "png"),
                ("RGBA", "png"),
                ("1", "png"),
                ("LA", "png"),
            ):
                write(tmp_path / split / name / f"{mode}.{kind}", mode=mode)
            palette = Image.open(tmp_path / split / name / "P.png")
            palette.save(tmp_path / split / name / "transparent.png", transparency=b"\x00\x80")
    config = CONFIG | {"input_size": (channels, 16, 16)}
    data = loaded(settings(tmp_path, aa="rand-m9", color_jitter=0.2), config=config, batch_size=14)
    assert next(data.train.batches(0))[0].shape == (14, channels, 16, 16)
    assert sum(len(images) for images, _ in data.validation or ()) == 14 and not data.bad_images
    assert len(data.preprocess["mean"]) == channels


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_stay_grey_and_what_cannot_be_converted_is_named(tmp_path: Path, channels: int) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.full((20, 20), 128 * 257, np.uint16)).save(tmp_path / split / name / "deep.png")
            Image.new("L", (20, 20), 128).save(tmp_path / split / name / "plain.png")
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / "val" / "a" / "float.tif")
    data = loaded(settings(tmp_path, no_aug=True), config=CONFIG | {"input_size": (channels, 16, 16)}, batch_size=4)
    images, _ = next(data.train.batches(0))
    assert images.unique().numel() == 1
    assert sum(len(batch) for batch, _ in data.validation or ()) == 4
    assert [image.mode for image, _ in data.validation_images].count("F") == 0, "nor is it verified on"
    assert "no known range" in data.bad_images[str(tmp_path / "val" / "a" / "float.tif")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named_counted_and_replaced(
    folder: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    broken = folder / "train" / "cat" / "3.png"
    corrupt(broken)
    data = loaded(settings(folder, workers=workers), batch_size=6)
    batches = [list(data.train.batches(epoch)) for epoch in (0, 1)]
    assert all(len(labels) == 6 for epoch in batches for _, labels in epoch) and len(batches[0]) == 4
    assert list(data.bad_images) == [str(broken)]
    warnings = [record for record in caplog.records if record.name == "okdc"]
    assert len(warnings) == 1 and str(broken) in warnings[0].getMessage()
    assert same(batches[1], loaded(settings(folder), batch_size=6).train.batches(1))
    assert all(len(images.flatten(1).unique(dim=0)) == 6 for images, _ in batches[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_validation_image_is_left_out_everywhere(folder: Path, workers: int) -> None:
    (folder / "val" / "9" / "0.png").write_bytes(b"not an image")
    data = loaded(settings(folder, workers=workers))
    labels = torch.cat([labels for _, labels in data.validation or ()])
    raw = list(data.validation_images or ())
    assert len(labels) == 11 and labels.tolist() == [label for _, label in raw]
    assert all(image.size == (20, 20) for image, _ in raw) and len(data.bad_images) == 1


def test_validation_images_are_those_of_the_batches(folder: Path) -> None:
    data = loaded(settings(folder), config=CONFIG | {"input_size": (3, 20, 20)})
    batches = torch.cat([images for images, _ in data.validation or ()])
    raw = [np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) for image, _ in data.validation_images or ()]
    torch.testing.assert_close(batches, (torch.from_numpy(np.stack(raw)) / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_corrupt_images_stop_the_run(folder: Path, workers: int) -> None:
    corrupt(*sorted((folder / "train" / "dog").iterdir())[:4])
    data = loaded(settings(folder, workers=workers, max_bad_images=3), batch_size=6)
    with pytest.raises(DataError, match=r"4 images cannot be read.*dog.*--max-bad-images"):
        list(data.train.batches(0))


def test_nothing_readable_at_all(folder: Path) -> None:
    corrupt(*(folder / "train").rglob("*.png"))
    with pytest.raises(DataError, match="none of the training images can be read"):
        list(loaded(settings(folder)).train.batches(0))
