"""Files that labels name as people do: without endings, as Windows writes them, in a folder near the table."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from okdc.data import Source, open_source
from tests.helpers.images import fails, settings, write

CLASSES = ("cat", "dog")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0000.jpg to 0019.jpg in train/, dogs at the odd numbers; and test/ with the same names."""
    for i in range(20):
        write(tmp_path / "train" / f"{i:04d}.jpg", i)
        write(tmp_path / "test" / f"{i:04d}.jpg", i)
    return tmp_path


def table(path: Path, names: Any, header: str = "id,label") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([header, *(f"{name},{CLASSES[i % 2]}" for i, name in enumerate(names))]), "utf-8")
    return path


def files(source: Source) -> dict[str, str]:
    """Image -> class."""
    return {
        images.name(i): source.classes[label]
        for images in (source.train, source.validation)
        for i, label in enumerate(images.labels.tolist())
    }


def check(given: Path, folder: Path, **changes: Any) -> None:
    found = files(open_source(settings(given, **changes), 0))
    expected = {str(folder / f"{i:04d}.jpg"): CLASSES[i % 2] for i in range(20)}
    assert {str(Path(path).resolve()): label for path, label in found.items()} == expected


@pytest.mark.parametrize(
    "name", ["{:04d}", "{:04d}.jpg", "{:04d}.JPG", "train/{:04d}", "train\\{:04d}.jpg", ".\\train\\{:04d}"]
)
def test_names_as_people_write_them(folder: Path, name: str) -> None:
    for header in ("id,label", "image_id,label", "path,class", "what,kind"):
        check(table(folder / "train.csv", [name.format(i) for i in range(20)], header), folder / "train")


def test_ids_win_over_other_columns_that_are_files_too(folder: Path) -> None:
    rows = [f"{i:04d},{19 - i:04d},{CLASSES[i % 2]}" for i in range(20)]
    (folder / "train.csv").write_text("\n".join(["id,twin,label", *rows]))
    check(folder / "train.csv", folder / "train")
    check(table(folder / "train.csv", [f"{i:04d}" for i in range(20)], "number,label"), folder / "train")


def test_a_table_in_a_folder_beside_the_images(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("{:04d}.jpg", "train/{:04d}.jpg"):
        check(table(folder / "labels" / "train.csv", [name.format(i) for i in range(20)]), folder / "train")
    assert f"are in '{folder / 'train'}'" in caplog.text
    given = table(
        folder / "pets" / "train.csv", [f"{i:04d}.jpg" for i in range(20)]
    )  # beside pets/ are other data sets
    fails(settings(given), "20 of the 20 files")


def test_each_split_in_its_own_folder(tmp_path: Path) -> None:
    rows = [(f"{i % 10}.jpg", CLASSES[i % 2], "train" if i < 10 else "val") for i in range(20)]
    for name, _, split in rows:
        write(tmp_path / f"my_{split}" / name)
    (tmp_path / "a.csv").write_text("\n".join(["filename,label,split", *map(",".join, rows)]))
    fails(settings(tmp_path / "a.csv"), "in several folders alike")  # of the whole: each folder has all names
    rows = [(f"{split}{name}", label, split) for name, label, split in rows]
    for name, _, split in rows:
        write(tmp_path / f"my_{split}" / name)
    (tmp_path / "a.csv").write_text("\n".join(["filename,label,split", *map(",".join, rows)]))
    source = open_source(settings(tmp_path / "a.csv"), 0)
    assert source.train.name(0) == str(tmp_path / "my_train" / "train0.jpg")
    assert source.validation.name(9) == str(tmp_path / "my_val" / "val9.jpg")


def test_marks_are_no_names_of_files(folder: Path) -> None:
    for name in ("0", "1"):
        write(folder / f"{name}.png")
    given = table(folder / "train.csv", [f"{i:04d},{i % 2},{i % 3}" for i in range(20)], "number,sick,old,label")
    check(given, folder / "train")


def test_folders_that_hold_the_same_names_are_asked_about(folder: Path) -> None:
    given = table(folder / "labels.csv", [f"{i:04d}" for i in range(20)])
    fails(settings(given), "several folders alike", str(folder / "test"), "Write the folder into the paths: test/0000")


def test_names_with_several_endings_are_asked_about(folder: Path) -> None:
    write(folder / "train" / "0003.png")
    given = table(folder / "train.csv", [f"{i:04d}" for i in range(20)])
    fails(settings(given), "1 names in", "'0003' (line 5 of train.csv)", "0003.jpg", "0003.png", "with their endings")
    check(table(folder / "train.csv", [f"{i:04d}.jpg" for i in range(20)]), folder / "train")


def test_what_is_missing_is_named_where_the_others_are(folder: Path) -> None:
    (folder / "train" / "0003.jpg").unlink()
    given = table(folder / "train.csv", [f"{i:04d}" for i in range(20)])
    (folder / "test" / "0004.jpg").unlink()
    (folder / "test" / "0005.jpg").unlink()
    fails(settings(given), "1 of the 20 files", f"{folder / 'train' / '0003'} (line 5 of train.csv)")


@pytest.mark.parametrize("start", ["C:\\Users\\ann\\pets\\", "/home/ann/"])
def test_paths_of_another_computer(folder: Path, start: str) -> None:
    given = table(folder / "a.csv", [f"{start}train/{i:04d}.jpg" for i in range(20)], "path,label")
    fails(settings(given), "20 of the 20", f"Cut '{start}' off the paths")


def test_accents_in_names_are_one_however_they_are_stored(folder: Path) -> None:
    write(folder / unicodedata.normalize("NFD", "é.jpg"))
    names = [f"train/{i:04d}.jpg" for i in range(20)]
    found = files(open_source(settings(table(folder / "a.csv", [*names, unicodedata.normalize("NFC", "é.jpg")])), 0))
    assert len(found) == 21


def fiftyone(path: Path, labels: Any, classes: Any = CLASSES) -> Path:
    path.write_text(json.dumps({"classes": classes, "labels": labels}))
    return path


def test_labels_of_fiftyone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train").rename(folder / "data")
    (folder / "test").rename(folder.parent / "elsewhere")
    indices = {f"{i:04d}": i % 2 for i in range(20)}
    names = {image: CLASSES[i] for image, i in indices.items()}
    for given in (
        fiftyone(folder / "a.json", indices),
        fiftyone(folder / "b.json", names, None),
        fiftyone(folder / "c.json", {image: {"label": i, "confidence": 0.9} for image, i in indices.items()}),
    ):
        check(given, folder / "data")
    unlabelled = fiftyone(folder / "labels.json", indices | {"0003": None})
    assert len(files(open_source(settings(unlabelled), 0))) == 19
    assert "without a label are left out: 0003" in caplog.text


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        ({"0000": 0, "0001": 2}, CLASSES, ("1 of the 2 labels", "0001", "index of its 2 classes")),
        ({"0000": 0, "0001": -1}, CLASSES, ("1 of the 2 labels", "0001")),
        ({"0000": "cat"}, CLASSES, ("1 of the 1 labels", "0000")),
        ({"0000": [0, 1]}, CLASSES, ("1 of the 1 labels", "0000")),
        ({"0000": 1}, None, ("expected a name",)),
        ({}, CLASSES, ("0 of the 0 labels",)),
        ([["0000", 0]], CLASSES, ("labels are no object", "as FiftyOne does")),
        ({"0000": 0}, {"0": "cat"}, ("not laid out",)),
    ],
)
def test_labels_of_fiftyone_that_cannot_be_trained_on(folder: Path, labels: Any, classes: Any, words: Any) -> None:
    fails(settings(fiftyone(folder / "labels.json", labels, classes)), *words)
