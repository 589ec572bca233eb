"""Tables as spreadsheets and programs write them: what is read the same, what is said of it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from okdc.data import Source, open_source
from tests.helpers.images import fails, settings, write

CLASSES = ("cat", "dog")
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a table of 20 images, dogs at the odd numbers: `row` makes a line of number and label."""
    for i in range(20):
        write(tmp_path / "im" / f"{i}.png", i)

    def to(name: str, header: str, row: Callable[[int, str], str], encoding: str = "utf-8", end: str = "") -> Path:
        lines = [header, *(row(i, CLASSES[i % 2]) for i in range(20))]
        (tmp_path / name).write_text("\n".join(line for line in lines if line) + "\n" + end, encoding)
        return tmp_path / name

    return to


def opened(table: Path) -> Source:
    return open_source(settings(table), 0)


def is_whole(table: Path, classes: tuple[str, ...] = CLASSES) -> bool:
    source = opened(table)
    labels = {
        Path(images.name(i)).stem: source.classes[label]
        for images in (source.train, source.validation)
        for i, label in enumerate(images.labels.tolist())
    }
    return source.classes == classes and labels == {str(i): classes[i % 2] for i in range(20)}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_what_excel_saves(save: Save, encoding: str) -> None:
    assert is_whole(save("a.csv", "path\tlabel", lambda i, c: f"im/{i}.png\t{c}", encoding))
    assert is_whole(save("a.csv", "sep=;\npath;kg;label", lambda i, c: f"im/{i}.png;1,5;{c}", encoding))
    assert is_whole(save("a.csv", "path,breed,,", lambda i, c: f"im/{i}.png,{c},,", encoding, ",,,\n,,,\n"))
    assert is_whole(save("a.csv", "Path , Label ", lambda i, c: f" im/{i}.png , {c} ,,", encoding))


def test_objects_in_lines(save: Save, tmp_path: Path) -> None:
    for label in (lambda i, c: c, lambda i, c: CLASSES.index(c)):
        row = lambda i, c: json.dumps({"file_name": f"im/{i}.png", "label": label(i, c), "box": [1, 2]})  # noqa: B023, E731
        assert is_whole(save("metadata.jsonl", "", row), CLASSES if label(0, "cat") == "cat" else ("0", "1"))
    fails(settings(save("b.jsonl", "[1]", lambda i, c: "{}")), "line 1 of", "no JSON object")
    fails(settings(save("b.jsonl", "{", lambda i, c: "{}")), "line 1 of", "no JSON object")
    listed = save("b.jsonl", "", lambda i, c: json.dumps({"file_name": f"im/{i}.png", "label": [c]}))
    fails(settings(listed), "20 rows", "no label")
    (tmp_path / "c.json").write_text(json.dumps([{"file_name": "im/0.png", "label": "cat"}]))
    fails(settings(tmp_path / "c.json"), "a list of objects", "jq -c '.[]'")
    (tmp_path / "c.json").write_text(json.dumps({f"im/{i}.png": CLASSES[i % 2] for i in range(20)}))
    assert is_whole(tmp_path / "c.json")


def test_a_column_for_each_class(save: Save, caplog: pytest.LogCaptureFixture) -> None:
    for header, row in (
        ("filename, cat, dog", lambda i, c: f"im/{i}.png, {1 - i % 2}, {i % 2}"),  # Roboflow
        ("image,age,cat,dog,unknown", lambda i, c: f"im/{i},{i},{1.0 - i % 2},{i % 2}.0,0.0"),  # ISIC
    ):
        assert is_whole(save("a.csv", header, row))
    assert "its columns of 0 and 1: cat, dog, unknown" in caplog.text and "not used: age" in caplog.text
    several = save("a.csv", "image,cat,dog", lambda i, c: f"im/{i},{1 - i % 2},{int(i % 2 or i < 3)}")
    fails(settings(several), "2 rows of", "(cat, dog), see lines 2, 4", "one label per image")


@pytest.mark.parametrize(
    ("flag", "no", "yes"), [("is_valid", "False", "True"), ("Is Train", "1", "0"), ("is_test", "", "yes")]
)
def test_a_column_that_flags_a_split(save: Save, flag: str, no: str, yes: str) -> None:
    source = opened(save("a.csv", f"path,label,{flag}", lambda i, c: f"im/{i}.png,{c},{yes if i < 4 else no}"))
    assert (len(source.train), len(source.validation)) == (16, 4)
    fails(settings(save("a.csv", f"path,label,{flag}", lambda i, c: f"im/{i}.png,{c},maybe")), "holds maybe")


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (lambda i, c: c.upper() if i > 15 else c, "nearly the same are classes of their own: CAT and cat, DOG and dog"),
        (lambda i, c: f"{i % 2}{'.0' * (i > 15)}", "0 and 0.0, 1 and 1.0"),
        (lambda i, c: "big cat" if i % 4 == 0 else "big_cat" if i % 2 == 0 else c, "big cat and big_cat"),
        (lambda i, c: "cat, dog" if i > 15 else c, "look like several are classes of their own: cat, dog"),
        (
            lambda i, c: f"{i // 2 * 0.25}",
            "look like measurements are a class each: 0.5, 0.25, 0.75, 1.5, 1.25 and 2 more",
        ),
        (lambda i, c: "nan" if i % 4 == 0 else c, "looks like a missing one is a class: nan"),
    ],
)
def test_labels_that_spreadsheets_spoil_are_said(
    save: Save, caplog: pytest.LogCaptureFixture, label: Callable[[int, str], str], words: str
) -> None:
    opened(save("a.csv", "path,label", lambda i, c: f'im/{i}.png,"{label(i, c)}"'))
    assert words in caplog.text
    caplog.clear()
    opened(save("a.csv", "path,label", lambda i, c: f"im/{i}.png,{c}"))
    assert not caplog.text


def test_columns_that_are_not_used_are_said(save: Save, caplog: pytest.LogCaptureFixture) -> None:
    opened(save("a.csv", ",path,label,fold", lambda i, c: f"{i},im/{i}.png,{c},{i % 5}"))
    assert "not used: (no name), fold" in caplog.text


def test_a_table_elsewhere_labels_a_flat_split_beside_class_folders(tmp_path: Path) -> None:
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for i in range(8):
        write(root / "train" / f"n0{i % 2}" / f"{i}.JPEG", i)
        write(root / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", i)
    rows = [f"ILSVRC2012_val_{i:08d},n0{i % 2}" for i in range(8)]
    (tmp_path / "val.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    for given in (str(tmp_path / "val.csv"), "../../../val.csv"):
        source = open_source(settings(root, val_split=given), 0)
        assert len(source.validation) == 8 and source.validation.labels.tolist() == [0, 1] * 4
