"""Labels in a CSV, TSV or JSON file: read as the same images in folders are; what is wrong is said before training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from okdc.data import open_source
from tests.helpers.images import fails, loaded, same, settings, write_split

CLASSES = ("cat", "dog", "10", "9")
Write = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_split(tmp_path / "train", 6, CLASSES)
    write_split(tmp_path / "val", 3, CLASSES)
    return tmp_path


@pytest.fixture
def rows(folder: Path) -> list[tuple[str, str, str]]:
    """(path, label, split) of each image."""
    found = sorted(folder.rglob("*.png"), reverse=True)
    return [(path.relative_to(folder).as_posix(), path.parent.name, path.parts[-3]) for path in found]


@pytest.fixture
def write(folder: Path) -> Write:
    def to(name: str, header: str, rows: Any, sep: str = ",", encoding: str = "utf-8") -> Path:
        lines = [header.replace(",", sep), *(sep.join(row) for row in rows)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding=encoding)
        return folder / name

    return to


@pytest.mark.parametrize(
    ("name", "header", "sep", "encoding"),
    [
        ("a.csv", "path,label,split", ",", "utf-8"),
        ("a.CSV", "Image Path,Class,Subset", ";", "utf-8-sig"),
        ("a.tsv", "FILENAME,Target,set", "\t", "utf-8"),
        ("a.csv", "file_name,category,split", "\t", "utf-8"),
        ("a.csv", "where,what,split", "|", "utf-8"),  # by what the cells hold
    ],
)
def test_a_table_is_read_as_folders_are(
    folder: Path, rows: Any, write: Write, name: str, header: str, sep: str, encoding: str
) -> None:
    ours = loaded(settings(write(name, header, rows, sep, encoding)))
    theirs = loaded(settings(folder))
    assert ours.classes == theirs.classes == ("9", "10", "cat", "dog") and ours.name == name
    assert same(ours.train.batches(0), theirs.train.batches(0)) and same(ours.validation, theirs.validation)


@pytest.mark.parametrize(
    ("train", "validation", "changes"),
    [
        ("Training", "valid", {}),
        ("TRAIN", "Test", {}),
        ("trainset", "validation", {}),
        ("a", "b", {"train_split": "a", "val_split": "b"}),
        ("fold 1", "fold 0", {"train_split": "fold 1", "val_split": "fold 0"}),
    ],
)
def test_splits_as_people_write_them(rows: Any, write: Write, train: str, validation: str, changes: Any) -> None:
    words = {"train": train, "val": validation}
    source = open_source(
        settings(write("a.csv", "path,label,split", [(p, c, words[s]) for p, c, s in rows]), **changes), 0
    )
    assert (len(source.train), len(source.validation)) == (24, 12)


def test_a_second_table_or_none_validates(rows: Any, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    first = write("a.csv", "path,label", [row[:2] for row in rows if row[2] == "train"])
    second = write("b.csv", "image,class", [row[:2] for row in rows if row[2] == "val"])
    for name in ("b.csv", str(second)):
        source = open_source(settings(first, val_split=name), 0)
        assert (len(source.train), len(source.validation), source.name) == (24, 12, "a.csv")
    whole = write("c.csv", "path,label,split", rows)
    assert len(open_source(settings(whole, val_split="b.csv"), 0).train) == 24
    assert "not used: 12 rows to validate with" in caplog.text
    assert "(90/10 split)" in open_source(settings(first), 0).name
    fails(settings(first, val_split="d.csv"), "--val-split d.csv", "no such file")
    fails(settings(first, val_split="b"), "has no splits", "--val-split FILE.csv")


def test_a_file_of_labels_validates_beside_class_folders(
    folder: Path, rows: Any, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = loaded(settings(folder))
    trained, validated = list(theirs.train.batches(0)), list(theirs.validation or ())
    flat = []
    for path, label, _ in [row for row in rows if row[2] == "val"]:
        flat.append((f"val/{label}_{Path(path).name}", label))
        (folder / path).rename(folder / flat[-1][0])
    for label in CLASSES:
        (folder / "val" / label).rmdir()
    fails(settings(folder), "holds images but no class folders")
    write("val.csv", "path,label", flat)
    coco(folder, "val.json", flat)
    for name in ("val.csv", "val.json"):
        ours = loaded(settings(folder, val_split=name))
        assert ours.classes == theirs.classes and ours.name == theirs.name
        assert same(ours.train.batches(0), trained) and same(ours.validation, validated)
    write("new.csv", "path,label", [*flat[1:], (flat[0][0], "cow")])
    fails(settings(folder, val_split="new.csv"), "no classes of", "cow", "9, 10, cat, dog")
    write("other.csv", "path,hint,kind", [(path, "", label) for path, label in flat])
    assert len(open_source(settings(folder, val_split="other.csv", label_column="kind"), 0).validation) == 12
    fails(settings(folder, val_split="none.csv"), "--val-split none.csv", "no such file")
    write("shared.csv", "path,label", [*[row for row in flat if row[1] != "cat"], ("train/dog/0.png", "dog")])
    open_source(settings(folder, val_split="shared.csv"), 0)
    assert "1 images of" in caplog.text and "no validation image of class cat" in caplog.text


def test_the_order_of_the_rows_is_nothing(rows: Any, write: Write) -> None:
    tables = [write(name, "path,label,split", some) for name, some in (("a.csv", rows), ("b.csv", sorted(rows)))]
    first, second = (loaded(settings(table)) for table in tables)
    assert same(first.train.batches(0), second.train.batches(0)) and same(first.validation, second.validation)


def test_columns_that_are_said(rows: Any, write: Write) -> None:
    table = write("a.csv", "mask,photo,breed,age", [("nothing", path, label, "3") for path, label, _ in rows])
    fails(settings(table), "which column of", "labels?", "mask, photo, breed, age", "--label-column NAME")
    source = open_source(settings(table, label_column="breed"), 0)
    assert source.classes == ("9", "10", "cat", "dog")
    fails(settings(table, label_column="bred"), "--label-column bred", "no such column", "breed")
    fails(
        settings(table, label_column="breed", path_column="mask"), "36 of the 36 files", "nothing", "--path-column NAME"
    )
    twice = write("b.csv", "photo,again,label", [(path, path, label) for path, label, _ in rows])
    fails(settings(twice), "which column of", "paths?", "photo, again holds", "--path-column NAME")
    assert len(open_source(settings(twice, path_column="again"), 0).train) == 32


def test_a_class_map_gives_the_indices_and_leaves_classes_out(
    folder: Path, rows: Any, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "map.txt").write_text("dog\ncat\n10\n")
    table = write("a.csv", "path,label,split", rows)
    source = open_source(settings(table, class_map="map.txt"), 0)
    assert source.classes == ("dog", "cat", "10") and len(source.train) == 18 and "leaves out" in caplog.text
    (folder / "map.txt").write_text("cow\n")
    fails(settings(table, class_map="map.txt"), "no class in common", "cow")


def test_paths_are_absolute_or_from_the_table(folder: Path, rows: Any, write: Write) -> None:
    (folder / "tables").mkdir()
    absolute = [(str(folder / path) if i % 2 else f"../{path}", *rest) for i, (path, *rest) in enumerate(rows)]
    source = open_source(settings(write("tables/a.csv", "path,label,split", absolute)), 0)
    assert len(source.train) == 24 and os.path.isfile(source.train.name(0))


def test_what_is_said_of_rows_that_train_anyway(rows: Any, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    more = [rows[-1], (rows[-1][0].replace("train/", "train/../train/"), *rows[-1][1:])]  # one image, three times
    more += [(path, label, "val") for path, label, split in rows[-2:-1]]
    rare = [row for row in rows if row[1:] != ("cat", "val")]
    source = open_source(settings(write("a.csv", "path,label,split", rare + more + [(*rows[0][:2], "test")])), 0)
    assert len(source.train) == 24
    for words in ("repeat an image are left out: 2", "1 images of", "train and validate", "not used: test"):
        assert words in caplog.text
    assert ("no validation image of class cat" in caplog.text) == (rows[-2][1] != "cat")


def edited(rows: Any, position: int, **changes: str) -> Any:
    path, label, split = rows[position]
    new = (changes.get("path", path), changes.get("label", label), changes.get("split", split))
    return [*rows[:position], new, *rows[position + 1 :]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda rows: edited(edited(rows, 0, path="a.png"), 2, path="b.png"),
            ("2 of the 36", "a.png (line 2", "b.png (line 4"),
        ),
        (lambda rows: edited(rows, 1, label=""), ("1 rows", "no path or no label", "line 3")),
        (lambda rows: edited(rows, 1, split="x"), ("what x is for is not known", "train, val or test", "--val-split")),
        (lambda rows: edited(rows, 1, split=""), ("what (empty) is for",)),
        (lambda rows: [(p, c, "test") for p, c, _ in rows], ("no row", "for training", "test", "--train-split")),
        (lambda rows: [(p, "cat", s) for p, _, s in rows], ("only one class (cat)",)),
        (
            lambda rows: [*rows, (rows[0][0], "x", rows[0][2])],
            ("two labels", "line 2 of a.csv", "x (line 38 of a.csv)"),
        ),
        (lambda rows: edited(rows, 0, label="a,b"), ("1 rows", "3 cells", "line 2", "quotes")),
        (lambda rows: edited(rows, 0, label='"a\nb"'), ("over several lines",)),
        (lambda rows: edited(rows, 0, label='"a"b'), ("cannot be read",)),
        (lambda rows: [(p, "new" if s == "val" else c, s) for p, c, s in rows], ("no training image of class new",)),
        (lambda rows: [], ("no rows", "path,label")),
    ],
)
def test_rows_that_cannot_be_trained_on(rows: Any, write: Write, change: Any, words: tuple[str, ...]) -> None:
    fails(settings(write("a.csv", "path,label,split", change(rows))), *words)


def test_what_is_no_table(folder: Path, rows: Any, write: Write) -> None:
    fails(settings(write("a.csv", ",".join(rows[0]), rows[1:])), "first line", rows[0][0], "path,label")
    fails(settings(write("a.csv", "path,label,split", [("é", "é", "é")], encoding="latin-1")), "UTF-8")
    fails(settings(folder / "b.csv"), "does not exist", "labels as .csv, .tsv or .json")
    fails(settings(folder / "train" / "cat" / "0.png"), "is a file", "table of paths and labels")
    fails(settings(folder, label_column="x"), "--label-column", "those of a table")


def test_labels_are_one_however_their_accents_are_stored(folder: Path, rows: Any, write: Write) -> None:
    accents = {"cat": "caf\u00e9", "dog": "cafe\u0301"}
    source = open_source(
        settings(write("a.csv", "path,label,split", [(p, accents.get(c, c), s) for p, c, s in rows])), 0
    )
    assert source.classes == ("9", "10", "caf\u00e9")
    (folder / "train" / "cat").rename(folder / "train" / "cafe\u0301")  # files are found as they are stored
    moved = [(path.replace("train/cat", "train/cafe\u0301"), *rest) for path, *rest in rows]
    for table in (coco(folder, "a.json", moved), write("b.csv", "path,label", [row[:2] for row in moved])):
        assert len(open_source(settings(table), 0).train) == 32


def coco(folder: Path, name: str, rows: Any, **changes: Any) -> Path:
    """The rows as COCO has them, with ids that are no indices."""
    content = {
        "info": {"year": 2026},
        "categories": [{"id": 7 * i, "name": cls} for i, cls in enumerate(CLASSES)],
        "images": [{"id": f"im{i}", "file_name": path} for i, (path, *_) in enumerate(rows)],
        "annotations": [
            {"id": i, "image_id": f"im{i}", "category_id": 7 * CLASSES.index(cls)}
            for i, (_, cls, *_) in enumerate(rows)
        ],
    }
    (folder / name).write_text(json.dumps(content | changes))
    return folder / name


def test_annotations_of_coco_are_read_as_folders_are(folder: Path, rows: Any, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (
        coco(folder, name, [row for row in rows if row[2] == split])
        for name, split in (("train.json", "train"), ("val.json", "val"))
    )
    ours, theirs = loaded(settings(first, val_split="val.json")), loaded(settings(folder))
    assert ours.classes == theirs.classes == ("9", "10", "cat", "dog")
    assert same(ours.train.batches(0), theirs.train.batches(0)) and same(ours.validation, theirs.validation)
    content = json.loads(second.read_text())
    second.write_text(json.dumps(content | {"annotations": content["annotations"][1:]}))
    assert len(open_source(settings(first, val_split="val.json"), 0).validation) == 11
    assert f"without an annotation are left out: {content['images'][0]['file_name']}" in caplog.text
    fails(settings(first, val_split="test"), "has no splits", "--val-split FILE.json")
    fails(settings(first, label_column="label"), "those of a table")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": []}, ("36 of the 36 annotations", "number 0, 1, 2")),
        ({"annotations": []}, ("0 of the 0", "images (id, file_name)")),
        ({"annotations": [{"image_id": "im0"}]}, ("category_id", "not laid out", "categories (id, name)")),
        ({"annotations": [{"image_id": "im0", "category_id": i} for i in (0, 7)]}, ("two labels", "annotation 1 of")),
        ({"categories": [{"id": i, "name": "cat"} for i in (0, 7)]}, ("categories of", "a name twice")),
        ({"images": ["a.png"]}, ("not laid out",)),
        ({"images": [{"id": f"im{i}", "file_name": f"{i}.png"} for i in range(36)]}, ("36 of the 36 files", "0.png")),
    ],
)
def test_annotations_that_cannot_be_trained_on(folder: Path, rows: Any, changes: Any, words: tuple[str, ...]) -> None:
    fails(settings(coco(folder, "a.json", rows, **changes)), *words)


def test_what_is_no_annotation_file(folder: Path) -> None:
    for text, words in (("{", "as JSON"), ("[]", "not laid out"), ("{}", "'images'"), ("\udcff", "as JSON")):
        (folder / "a.json").write_text(text, encoding="utf-8", errors="surrogateescape")
        fails(settings(folder / "a.json"), words, "expected images (id, file_name)")
