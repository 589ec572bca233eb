"""What --data names: digits, folders, data sets of torchvision; and what is refused before training."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from okdc.data import open_source
from okdc.recipe import DataSettings
from tests.helpers.images import fails, loaded, settings, write, write_split


def test_digits_are_split_the_same_way_for_every_seed() -> None:
    first, second = open_source(DataSettings(), 0), open_source(DataSettings(), 1)
    assert (len(first.train), len(first.validation)) == (1437, 360)
    assert first.classes == tuple("0123456789") and first.name == "digits"
    assert torch.equal(first.train.indices, second.train.indices)
    assert set(first.train.indices.tolist()).isdisjoint(first.validation.indices.tolist())
    per_class = torch.bincount(first.validation.labels)
    assert per_class.min() >= 34 and per_class.max() <= 38
    image, label = first.train[0]
    assert image.size == (8, 8) and image.mode in ("L", "RGB") and label == int(first.train.labels[0])


def test_digits_train_in_batches_of_the_size_and_range_that_the_network_takes() -> None:
    data = loaded(DataSettings(workers=0), batch_size=64)
    images, labels = next(data.train.batches(0))
    assert images.shape == (64, 3, 16, 16) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert -2.01 <= images.min() < -1.5 and 1.5 < images.max() <= 2.01
    assert len(data.train) == 1437 // 64 and data.sizes == (1437, 360)
    assert sum(len(labels) for _, labels in data.validation or ()) == 360


def test_a_folder_with_train_and_val_keeps_one_index_per_class(folder: Path) -> None:
    source = open_source(settings(folder), 0)
    assert source.classes == ("9", "10", "cat", "dog") and source.name == "pets"
    assert (len(source.train), len(source.validation)) == (24, 12)
    for images in (source.train, source.validation):
        for i in range(len(images)):
            assert Path(images.name(i)).parent.name == source.classes[images[i][1]]


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_names_of_the_validation_folder(folder: Path, name: str) -> None:
    (folder / "val").rename(folder / name)
    assert len(open_source(settings(folder), 0).validation) == 12


def test_class_folders_alone_are_split_and_that_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "train").rename(folder.parent / "flat")
    with caplog.at_level(logging.INFO, "okdc"):
        source = open_source(settings(folder.parent / "flat"), 0)
    assert "21 train, 3 validate" in caplog.text and source.name == "flat (90/10 split)"
    again = open_source(settings(folder.parent / "flat"), 1)
    assert [again.train.name(i) for i in range(21)] == [source.train.name(i) for i in range(21)]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_split(tmp_path, classes=("bus", "train", "tram"))
    assert open_source(settings(tmp_path), 0).classes == ("bus", "train", "tram")


def test_class_map_gives_the_indices(folder: Path) -> None:
    (folder / "map.txt").write_text("dog\ncat\n9\n10\n")
    source = open_source(settings(folder, class_map=str(folder / "map.txt")), 0)
    assert source.classes == ("dog", "cat", "9", "10")
    assert (
        Path(source.validation.name(len(source.validation) - 1)).parent.name == source.classes[source.validation[11][1]]
    )


def test_file_types_that_timm_does_not_look_for_by_default(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i, extension in enumerate(("bmp", "webp", "JPEG", "tif")):
            write(tmp_path / name / f"{i}.{extension}")
    source = open_source(settings(tmp_path), 0)
    assert len(source.train) + len(source.validation) == 8


def test_torchvision_data_sets(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    source = open_source(settings(f"torch/fashion_mnist:{tmp_path}"), 0)
    assert (len(source.train), len(source.validation)) == (30, 20) and source.classes[9] == "Ankle boot"
    image, label = source.train[13]
    assert image.size == (28, 28) and label == 3 and source.train.name(13).startswith("image 13 of torch/fashion_mnist")


def write_fashion_mnist(raw: Path) -> None:
    raw.mkdir(parents=True)
    for split, count in (("train", 30), ("t10k", 20)):
        labels, pixels = np.arange(count, dtype=np.uint8) % 10, np.zeros((count, 28, 28), np.uint8)
        for name, array in (("labels-idx1", labels), ("images-idx3", pixels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (raw / f"{split}-{name}-ubyte").write_bytes(header + array.tobytes())


def test_missing_path_names_what_is_there(folder: Path) -> None:
    fails(settings(folder.parent / "pest"), "does not exist", "Did you mean pets?")
    fails(settings(folder / "pets"), f"--data {folder}")
    fails(settings("digit"), "Did you mean digits?")


def test_path_one_level_too_high_or_too_low(folder: Path) -> None:
    fails(settings(folder.parent), f"--data {folder}")
    fails(settings(folder / "train"), "one split", f"--data {folder}")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    (folder / "x.zip").write_text("x")
    fails(settings(folder / "x.zip"), "is a file", "Unpack")


def test_empty_folders(tmp_path: Path) -> None:
    fails(settings(tmp_path), "is empty", "one folder per class")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    fails(settings(tmp_path), "is empty", "train")


def test_images_outside_class_folders(tmp_path: Path, folder: Path) -> None:
    write(tmp_path / "unsorted" / "train" / "1.png")
    write(tmp_path / "unsorted" / "val" / "1.png")
    fails(settings(tmp_path / "unsorted"), "train' holds images but no class folders")
    write(tmp_path / "loose" / "1.png")
    fails(settings(tmp_path / "loose"), "no class folders")
    write(folder / "train" / "1.png")
    fails(settings(folder), "beside its class folders")


def test_a_class_without_images_is_named(folder: Path) -> None:
    (folder / "train" / "ferret").mkdir()
    (folder / "train" / ".hidden").mkdir()
    fails(settings(folder), "ferret", "delete the folder")
    (folder / "train" / "ferret").rmdir()
    (folder / "map.txt").write_text("dog\ncat\nparrot\n")
    fails(settings(folder, class_map="map.txt"), "no training image of class parrot")


def test_one_class_only(tmp_path: Path) -> None:
    write_split(tmp_path / "train", classes=("cat",))
    fails(settings(tmp_path), "only one class (cat)", "at least two")


def test_classes_that_differ_between_the_splits_are_named(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    fails(settings(folder), "train: dog", "val: wolf", "Rename")


def test_split_names_that_are_not_there(folder: Path) -> None:
    fails(settings(folder, val_split="vall"), "no folder 'vall'", "--val-split", "Did you mean val?")
    (folder / "train").rename(folder / "images")
    fails(settings(folder), "no folder 'train'", "images", "--train-split")
    assert len(open_source(settings(folder, train_split="images"), 0).train) == 24


def test_a_single_image_cannot_be_split(tmp_path: Path) -> None:
    write_split(tmp_path, 1, ("cat",))
    write_split(tmp_path, 3, ("dog",))
    fails(settings(tmp_path), "only one image of class cat", "val/")


def test_class_map_that_fits_no_folder(folder: Path) -> None:
    (folder / "map.txt").write_text("x\ny\n")
    fails(settings(folder, class_map=str(folder / "map.txt")), "no class in common", "--class-map")
    fails(settings(folder, class_map="missing.txt"), "cannot read the class map", "missing.txt")


def test_labels_out_of_range(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    write_fashion_mnist(raw)
    labels = raw / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + bytes([12]))
    fails(settings(f"torch/fashion_mnist:{tmp_path}"), "from 0 to 12", "expected 0 to 9")


def test_data_sets_that_are_not_at_hand(tmp_path: Path) -> None:
    fails(settings("torch/cifar1000"), "cifar1000", "Did you mean cifar100")
    fails(settings(f"torch/cifar10:{tmp_path}"), "cannot open", "--dataset-download")


@pytest.mark.parametrize(
    ("name", "package"), [("hfds/x", "datasets"), ("wds/x", "webdataset"), ("tfds/x", "tensorflow_datasets")]
)
def test_missing_packages_are_asked_for(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails(settings(name), f"pip install {package}")
