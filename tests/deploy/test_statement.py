"""What a bundle says of itself: names of classes by line, and whose programs it has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import okdc
from okdc.deploy import statement
from okdc.errors import ExportError
from okdc.system import shipped

PROGRAM = shipped.folder("export") / "predict.py"


def test_labels_come_back_as_they_were(tmp_path: Path) -> None:
    names = ("next\x85line", "line\u2028separator", "form\x0cfeed", "file\x1cseparator", " spaces ", "ordinary")
    statement.write_labels(tmp_path / "labels.txt", names)
    assert statement.read_labels(tmp_path) == names
    assert (tmp_path / "labels.txt").read_bytes().count(b"\n") == len(names)
    (tmp_path / "labels.txt").write_bytes(b"red\r\ngreen\r\n")  # by an editor on Windows
    assert statement.read_labels(tmp_path) == ("red", "green")
    for name in ("two\nlines", "two\rlines"):
        with pytest.raises(ExportError, match="has a line break"):
            statement.write_labels(tmp_path / "labels.txt", ["red", name])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    shutil.copy(PROGRAM, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"okdc": {"version": okdc.__version__}}))
    statement.note_programs(tmp_path)
    return tmp_path


def note(bundle: Path, **changes: object) -> None:
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({"okdc": config["okdc"] | changes}))


def test_the_programs_of_this_okdc_are_known(bundle: Path) -> None:
    assert statement.odd_programs(bundle) == ({}, {})
    note(bundle, programs={})  # by an okdc that noted nothing
    assert statement.odd_programs(bundle) == ({}, {})
    (bundle / "mine.py").write_text("print('hello')\n")
    assert statement.odd_programs(bundle) == ({}, {})


def test_a_program_that_is_not_what_the_bundle_says_is_wrong(bundle: Path) -> None:
    (bundle / "predict.py").write_text("print('cat')\n")
    wrong, other = statement.odd_programs(bundle)
    assert "it was changed: it is not the predict.py of this okdc" in wrong["predict.py"] and other == {}
    note(bundle, version="0.0.9", programs={"predict.py": "0" * 64})
    wrong, other = statement.odd_programs(bundle)
    assert "not the predict.py of okdc 0.0.9" in wrong["predict.py"] and other == {}


def test_of_another_okdcs_program_it_is_said_whose_it_is(bundle: Path) -> None:
    (bundle / "predict.py").write_text("print('cat')\n")
    statement.note_programs(bundle)
    note(bundle, version="0.0.9")
    wrong, other = statement.odd_programs(bundle)
    assert wrong == {} and "made by okdc 0.0.9" in other["predict.py"] and okdc.__version__ in other["predict.py"]
    note(bundle, programs={})
    assert statement.odd_programs(bundle)[1] == other
