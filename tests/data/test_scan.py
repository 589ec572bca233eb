"""Files as phones, microscopes and systems leave them: read, counted as unreadable, or said, never passed over."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from okdc.data import Data, open_source, sources
from okdc.data.scan import Files
from okdc.recipe import DataSettings
from tests.helpers.images import loaded, settings, write, write_split

CLASSES = ("cat", "dog")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_split(tmp_path / "train", 6, CLASSES)
    write_split(tmp_path / "val", 3, CLASSES)
    return tmp_path


def read(folder: Path) -> Data:
    data = loaded(settings(folder, resident="off"))
    for _ in data.train.batches(0):
        pass
    return data


def test_heic_counts_as_an_image_that_needs_a_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = folder / "train" / "cat" / "IMG_1.HEIC"
    Image.new("RGB", (20, 20)).save(photo, "PNG")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = read(folder)
    assert data.bad_images == {str(photo): "OSError: HEIC needs a decoder: pip install pillow-heif"}
    assert data.unreadable == {"training": {"cat": 1}}
    called: list[bool] = []
    module = SimpleNamespace(register_heif_opener=lambda: called.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    assert not read(folder).bad_images and called


@pytest.mark.parametrize(
    ("ending", "kind"), [("jp2", "JPEG2000"), ("TGA", "TGA"), ("mpo", "MPO"), ("pbm", "PPM"), ("pnm", "PPM")]
)
def test_rarer_kinds_are_read(folder: Path, ending: str, kind: str) -> None:
    mode = "1" if ending == "pbm" else "RGB"
    Image.new(mode, (20, 20)).save(folder / "train" / "cat" / f"x.{ending}", kind)
    data = read(folder)
    assert data.sizes == (13, 6) and not data.bad_images


@pytest.mark.parametrize(("name", "kind"), [("stack.tif", "TIFF"), ("clip.gif", "GIF"), ("clip.webp", "WEBP")])
def test_pages_that_are_not_read_are_said(folder: Path, caplog: pytest.LogCaptureFixture, name: str, kind: str) -> None:
    first, second = (Image.new("RGB", (20, 20), color) for color in ("black", "white"))
    first.save(folder / "train" / "cat" / name, kind, save_all=True, append_images=[second])
    # A phone's second view of a photo is no page.
    first.save(folder / "train" / "dog" / "photo.jpg", "MPO", save_all=True, append_images=[second])
    source = open_source(settings(folder), 0)
    found = {Path(source.train.name(i)).name: source.train[i][0] for i in range(len(source.train))}
    assert found[name].convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    read(folder)
    assert "several pages or frames, of which the first one is read" in caplog.text
    assert name in caplog.text and "photo.jpg" not in caplog.text


def test_what_systems_leave_behind_is_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("$RECYCLE.BIN", "System Volume Information", "lost+found"):
        (folder / "train" / name).mkdir()
        write(folder / "val" / name / "0.png")
    for name in ("Icon\r", "ehthumbs.db", "ehthumbs_vista.db", "Thumbs.db:encryptable", "desktop.ini", ".picasa.ini"):
        (folder / "train" / "cat" / name).write_text("x")
    assert read(folder).sizes == (12, 6) and not caplog.text


def test_kinds_that_are_left_out_are_all_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for ending in ("dng", "cr2", "jxl", "psd", "svg", "jpg_large"):
        (folder / "train" / "cat" / f"x.{ending}").write_text("x")
    (folder / "train" / "cat" / "IMG_1").write_text("x")
    open_source(settings(folder), 0)
    assert "left out: 1 of .cr2, 1 of .dng, 1 of .jpg_large, 1 of .jxl, 1 of .psd, 1 of .svg, 1 of no" in caplog.text


def test_folders_that_look_like_copies_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copies = ("cat (1)", "cat - Copy", "cat - Copy (2)", "cat copy", "cat copy 2", "Copy of dog", "dog (copy)", "dog 2")
    alone = ("10", "bird 2", "carbon copy", "copy", "owl (2)", "cat-like")
    write_split(tmp_path, 2, (*CLASSES, *copies, *alone))
    assert len(open_source(settings(tmp_path), 0).classes) == 16
    said = caplog.text.partition("classes of their own: ")[2].splitlines()[0]
    assert said == "cat (1), cat - Copy, cat - Copy (2), cat copy, cat copy 2 and 3 more"


def test_the_first_rank_finds_the_files_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        for name in ("cat/1.png", "dog/ü ☃.png", os.fsdecode(b"dog/\xff.png")):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path, format="png")
    given = DataSettings(data=str(tmp_path))
    alone = sources.open_together(given, 0)
    sent = pickle.dumps(sources.open_source(given, 0))
    monkeypatch.setattr(sources, "first", lambda work: pickle.loads(sent))
    monkeypatch.setattr(sources, "open_source", None)  # which another rank does not call
    told = sources.open_together(given, 0)
    for mine, theirs in ((alone.train, told.train), (alone.validation, told.validation)):
        assert [mine.name(i) for i in range(3)] == [theirs.name(i) for i in range(3)]
        assert theirs[2][0].size == (8, 8) and mine.dataset.targets == theirs.dataset.targets
    assert told.classes == ("cat", "dog")
    assert pickle.loads(pickle.dumps(Files(tmp_path, [], []))).paths == []
