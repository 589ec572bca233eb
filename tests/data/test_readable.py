"""Images that cannot be read: counted by class and split, and an end where too many are missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import okdc
from okdc.data import Data, load, open_source
from okdc.errors import DataError
from okdc.needs import Needs
from okdc.recipe import DataSettings
from tests.helpers.images import CONFIG, corrupt, write_split

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
CLASSES = ("cat", "cow", "dog")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_split(tmp_path / "train", 6, CLASSES)
    write_split(tmp_path / "val", 4, CLASSES)
    return tmp_path


def loaded(folder: Path, needs: Needs = Needs(), **changes: Any) -> Data:  # noqa: B008
    given = replace(DataSettings(data=str(folder), workers=0, no_aug=True), **changes)
    source = open_source(given, 7)
    return load(source, given, CONFIG, batch_size=6, validation_batch_size=4, seed=7, device="cpu", needs=needs)


@pytest.mark.parametrize("resident", ["auto", "off"])
@pytest.mark.parametrize(("split", "words"), [("train", "training"), ("val", "validation")])
def test_a_class_that_cannot_be_read_stops_a_run_before_training(
    folder: Path, resident: str, split: str, words: str
) -> None:
    for image in (folder / split / "cow").iterdir():
        image.write_text(POINTER)
    with pytest.raises(DataError, match=rf"{words} images of class cow (can|cannot) be read.*git lfs pull"):
        loaded(folder, resident=resident)
    for image in (folder / split).rglob("*.png"):
        image.write_text(POINTER)
    with pytest.raises(DataError, match=rf"{words} images.*be read.*git lfs pull"):
        loaded(folder, resident=resident)


@pytest.mark.parametrize("resident", ["auto", "off"])
def test_a_class_that_lost_most_of_its_images_stops_a_run(folder: Path, resident: str) -> None:
    cows = sorted((folder / "train" / "cow").iterdir())
    corrupt(*cows[:3])
    data = loaded(folder, resident=resident)
    list(data.train.batches(0))
    assert data.image_counts["training"]["cow"] == {"images": 6, "unreadable": 3}
    corrupt(cows[3])
    with pytest.raises(DataError, match=r"4 of the 6 training images of class cow cannot be read.*mend the files"):
        list(loaded(folder, resident=resident).train.batches(0))


@pytest.mark.parametrize("resident", ["auto", "off"])
def test_half_of_a_split_is_not_the_data_set(folder: Path, resident: str) -> None:
    for cls in CLASSES:
        corrupt(*sorted((folder / "val" / cls).iterdir())[1:3])
    with pytest.raises(DataError, match="6 of the 12 validation images cannot be read"):
        list(loaded(folder, resident=resident).validation or ())


@pytest.mark.parametrize("needs", [Needs(), Needs(held_out=True)], ids=["all", "some set aside"])
def test_images_are_counted_by_class_and_split_once_each(folder: Path, needs: Needs) -> None:
    corrupt(folder / "train" / "dog" / "0.png", folder / "val" / "cat" / "2.png")
    data = loaded(folder, needs, resident="off")
    expected = {
        split: {cls: {"images": images, "unreadable": 0} for cls in CLASSES}
        for split, images in (("training", 6), ("validation", 4))
    }
    assert data.image_counts == expected
    for epoch in (0, 1):
        list(data.train.batches(epoch)), list(data.validation or ()), list(data.validation_images or ())
        list(data.held_out or ())
    expected["training"]["dog"]["unreadable"] = expected["validation"]["cat"]["unreadable"] = 1
    assert data.image_counts == json.loads(json.dumps(expected)) and len(data.bad_images) == 2


def test_reports_and_bundle_say_what_could_not_be_read(folder: Path) -> None:
    corrupt(folder / "train" / "cow" / "2.png", folder / "val" / "dog" / "1.png", folder / "val" / "dog" / "2.png")
    result = okdc.compress(
        "test_resnet", data=str(folder), method="baseline", output=folder / "runs", epochs=1, img_size=32,
        batch_size=6, workers=0, device="cpu", batch_sizes=[],
    )  # fmt: skip
    lost = {"training": {"cow": 1}, "validation": {"dog": 2}}
    told = json.loads((result.path / "report.json").read_text(encoding="utf-8"))["data"]
    assert told["unreadable"] == lost and told["image_counts"]["validation"]["dog"] == {"images": 4, "unreadable": 2}
    assert "| validation images not read | 2 of dog |" in (result.path / "report.md").read_text(encoding="utf-8")
    assert "<dt>training images not read</dt><dd>1 of cow</dd>" in (result.path / "report.html").read_text()
    assert json.loads((result.path / "export" / "verification.json").read_text())["data"]["unreadable"] == lost
    assert "the validation split that could not be read: 2 of dog" in (result.path / "export" / "README.md").read_text()
