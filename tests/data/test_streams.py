"""Streams on several ranks: shards divided, steps agreed upon, and what is skipped not decoded."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from okdc.data import Data, load, open_source, stream_reading
from okdc.errors import DataError
from okdc.recipe import DataSettings
from tests.helpers.images import CONFIG, fails, generator_states, loaded, same, settings, write

wds = pytest.importorskip("webdataset", reason="streams: pip install webdataset")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files open
LENGTHS = (5, 8, 9, 10)  # images of the shards that are trained on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 32 images, one of which cannot be read, and of 9 to validate."""
    folder = tmp_path_factory.mktemp("shards")
    for name, count in (*((f"train-{i}", count) for i, count in enumerate(LENGTHS)), ("val-0", 9)):
        with wds.TarWriter(str(folder / f"{name}.tar")) as writer:
            for i in range(count):
                image = write(folder / "one.png", 7 * i).read_bytes()
                image = image[:60] if (name, i) == ("train-1", 3) else image
                writer.write({"__key__": f"{name}-{i}", "png": image, "cls": i % 3})
    (folder / "classes.txt").write_text("cat\ndog\nbird\n")
    return folder


def read(folder: Path, workers: int, rank: int = 0, world: int = 1, shards: int = 4, **changes: Any) -> Data:
    splits = {"train_split": f"train-{{0..{shards - 1}}}.tar|32", "val_split": "val-0.tar|9"}
    classes = str(folder / "classes.txt")
    given = DataSettings(data=f"wds/{folder}", class_map=classes, workers=workers, **splits, **changes)  # type: ignore[arg-type]
    source = open_source(given, 7)
    return load(
        source, given, CONFIG, batch_size=4, validation_batch_size=2, seed=7, device="cpu", rank=rank, world=world
    )


def test_ranks_take_the_batches_of_one_process_with_all_their_workers_in_turn(folder: Path) -> None:
    augmented = {"mixup": 0.4, "reprob": 0.5}
    whole = list(read(folder, 2, **augmented).train.batches(1))
    for rank in range(2):
        data = read(folder, 1, rank, 2, **augmented)
        assert len(data.train) == 4 and data.sizes[0] == 32
        assert same(data.train.batches(1), whole[rank::2])
    validation = list(read(folder, 1).validation or ())
    for rank in range(2):
        assert same(read(folder, 1).validation.every(rank, 2), validation[rank::2])  # type: ignore[union-attr]


def test_what_a_resumed_run_has_seen_is_not_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = multiprocessing.Value("i")
    original = stream_reading._decoded

    def counting(file: bytes) -> Image.Image:
        with decoded.get_lock():
            decoded.value += 1
        return original(file)

    monkeypatch.setattr(stream_reading, "_decoded", counting)
    data = read(folder, 2, 1, 2)
    whole = list(data.train.batches(1))
    assert decoded.value == 16 and [len(labels) for _, labels in whole] == [4] * 4
    for start in (1, 3):
        decoded.value = 0
        assert same(data.train.batches(1, start), whole[start:])
        assert decoded.value == 16 - 4 * start


def test_shards_that_cannot_be_divided_are_refused_or_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="fewer training shards, 3, than there are workers of 2 processes, 4: -j 1"):
        read(folder, 2, world=2, shards=3)
    with pytest.raises(DataError, match="--devices 4 -j 1"):
        read(folder, 1, world=8)
    read(folder, 2, world=2)
    assert "divide" not in caplog.text
    data = read(folder, 2, shards=3)
    assert "the 2 workers cannot divide 3 training shards evenly" in caplog.text
    assert len(data.train) == len(list(data.train.batches(0))) == 8  # though one worker has 5, 8 or 9 images of its own


def test_images_of_the_hub_are_divided_and_skipped_alike(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="hfids: pip install datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for name, count in (("train", 16), ("validation", 4)):
        pixels = np.random.default_rng(0).integers(0, 255, (count, 20, 20, 3), dtype=np.uint8)
        rows = {"image": [Image.fromarray(each) for each in pixels], "label": [i % 2 for i in range(count)]}
        every = datasets.Dataset.from_dict(rows, features=features)
        for i in range(4 if name == "train" else 1):
            every.shard(4 if name == "train" else 1, i).to_parquet(str(tmp_path / f"{name}-{i}.parquet"))
    (tmp_path / "README.md").write_text(CARD)

    def read_hub(workers: int, rank: int = 0, world: int = 1) -> Data:
        given = DataSettings(data=f"hfids/{tmp_path}", workers=workers, resident="off")
        source = open_source(given, 7)
        return load(
            source, given, CONFIG, batch_size=2, validation_batch_size=2, seed=7, device="cpu", rank=rank, world=world
        )

    whole = list(read_hub(2).train.batches(0))
    assert len(whole) == 8 and sorted(torch.cat([labels for _, labels in whole]).tolist()) == [0] * 8 + [1] * 8
    data = read_hub(1, 1, 2)
    assert same(data.train.batches(0), whole[1::2]) and same(data.train.batches(0, 3), whole[7::2])
    assert len(list(data.validation or ())) == 2


CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype: {class_label: {names: {'0': cat, '1': dog}}}
  splits:
  - {name: train, num_bytes: 1, num_examples: 16}
  - {name: validation, num_bytes: 1, num_examples: 4}
  download_size: 1
  dataset_size: 1
configs:
- config_name: default
  data_files:
  - {split: train, path: train-*.parquet}
  - {split: validation, path: validation-*.parquet}
---
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its tar files for the collector to close
def test_webdataset_streams_are_the_same_each_time_an_epoch_is_read(shards: Path) -> None:
    splits = {"train_split": "train-{0..1}.tar|24", "val_split": "val-0.tar|9"}
    fails(settings(f"wds/{shards}", **splits), "--class-map")
    given = settings(f"wds/{shards}", class_map=str(shards / "classes.txt"), workers=2, **splits)
    before = generator_states()
    data = loaded(given, batch_size=4)
    whole = list(data.train.batches(1))
    assert len(whole) == len(data.train) == 6 and data.classes == ("cat", "dog", "bird")
    assert same(whole[2:], data.train.batches(1, start=2)) and same(whole, loaded(given, batch_size=4).train.batches(1))
    assert not same(whole, data.train.batches(0))
    labels = torch.cat([labels for _, labels in data.validation or ()]).tolist()
    assert labels == [0, 1, 2] * 3 == [label for _, label in data.validation_images or ()]
    assert generator_states() == before
