"""Images in folders and in shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.images import write, write_split


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_split(tmp_path / "pets" / "train")
    write_split(tmp_path / "pets" / "val", 3)
    return tmp_path / "pets"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    wds = pytest.importorskip("webdataset", reason="streams: pip install webdataset")
    for name, count in (("train-0", 12), ("train-1", 12), ("val-0", 9)):
        with wds.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            for i in range(count):
                image = write(tmp_path / "one.png", 3 * i).read_bytes()
                writer.write({"__key__": f"{name}-{i}", "png": image, "cls": i % 3})
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    return tmp_path
