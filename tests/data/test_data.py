from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from okdc.data import Data, load, open_source, wrap
from okdc.data.batches import CountedBatches
from okdc.data.readable import BadImages
from okdc.data.streams import _read
from okdc.errors import DataError
from okdc.recipe import DataSettings
from okdc.system.waiting import Alarm, Stuck, Waiting
from okdc.training.machine import _precision

CONFIG = {
    "input_size": (3, 16, 16),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def settings(path: Path | str, **changes: Any) -> DataSettings:
    return replace(DataSettings(data=str(path), workers=0, resident="off"), **changes)  # test_resident.py has the rest


def write(path: Path, color: int = 0, mode: str = "RGB", size: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient = np.linspace(0, 200, size * size, dtype=np.uint8).reshape(size, size) + np.uint8(color)
    Image.fromarray(gradient).convert(mode).save(path)
    return path


def write_split(folder: Path, count: int = 6, classes: tuple[str, ...] = ("cat", "dog", "10", "9")) -> Path:
    for number, name in enumerate(classes):
        for i in range(count):
            write(folder / name / f"{i}.png", 10 * number + i)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_split(tmp_path / "pets" / "train")
    write_split(tmp_path / "pets" / "val", 3)
    return tmp_path / "pets"


def loaded(given: DataSettings, batch_size: int = 5, config: dict[str, Any] = CONFIG, seed: int = 7) -> Data:
    source = open_source(given, seed)
    return load(source, given, config, batch_size=batch_size, validation_batch_size=4, seed=seed, device="cpu")


def same(left: Any, right: Any) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(x1, x2) and torch.equal(y1, y2) for (x1, y1), (x2, y2) in zip(left, right)
    )


def generator_states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()


# -- sources --------------------------------------------------------------------------------------------------------


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


# -- errors before training -----------------------------------------------------------------------------------------


def fails(given: DataSettings, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(given, 0)
    for word in words:
        assert word in str(caught.value)


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


def test_batch_larger_than_the_data_set(folder: Path) -> None:
    with pytest.raises(DataError, match=r"24 training images, fewer than one batch of 25.*-b 24"):
        loaded(settings(folder), batch_size=25)


def test_channels_that_no_image_has(folder: Path) -> None:
    with pytest.raises(DataError, match=r"4 channels.*--in-chans"):
        loaded(settings(folder), config=CONFIG | {"input_size": (4, 16, 16)})


@pytest.mark.parametrize("changes", [{"aa": "rnd-m9"}, {"interpolation": "cubic"}])
def test_augmentation_that_timm_does_not_know(folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(changes.values()))}.*expected a policy"):
        loaded(settings(folder, **changes))


# -- stateless batches ----------------------------------------------------------------------------------------------

AUGMENTED = {"color_jitter": 0.3, "aa": "rand-m9-mstd0.5", "reprob": 0.5, "mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1}


def test_a_random_way_to_resize_needs_a_resized_crop(folder: Path) -> None:
    with pytest.raises(DataError, match=r"--train-interpolation random .*leave it out"):
        loaded(settings(folder, train_interpolation="random", crop_padding=2))


RANDOM = {
    "reprob": 0.7, "remode": "pixel", "recount": 3, "train_interpolation": "random", "mixup": 0.5, "cutmix": 1.0,
    "mixup_prob": 0.6, "mixup_switch_prob": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, AUGMENTED, {"crop_padding": 2}, RANDOM], ids=["plain", "augmented", "padded", "random"]
)
def test_batches_do_not_depend_on_the_number_of_workers(folder: Path, changes: dict[str, Any]) -> None:
    alone, pair = (loaded(settings(folder, workers=workers, **changes)) for workers in (0, 2))
    for epoch in (0, 1):
        assert same(alone.train.batches(epoch), pair.train.batches(epoch))
    assert same(alone.validation or (), pair.validation or ())


def test_start_gives_the_tail_of_the_epoch_without_reading_the_rest(folder: Path) -> None:
    data = loaded(settings(folder, **AUGMENTED))
    whole = list(data.train.batches(3))
    assert len(whole) == len(data.train) == 4
    for start in (1, 3, 4):
        assert same(whole[start:], data.train.batches(3, start=start))
    for path in (folder / "train").rglob("*.png"):
        path.unlink()
    assert list(data.train.batches(3, start=4)) == []


def test_an_abandoned_epoch_leaves_nothing_behind(folder: Path) -> None:
    data = loaded(settings(folder, workers=2))
    expected = list(data.train.batches(1))
    next(data.train.batches(0))
    assert same(expected, data.train.batches(1))


def test_an_interrupt_is_left_to_the_main_process(folder: Path) -> None:
    data = loaded(settings(folder, workers=1))
    expected, batches = list(data.train.batches(0)), data.train.batches(0)
    first = next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGINT)  # as Ctrl-C does, which reaches the whole process group
    assert same(expected, [first, *batches])


@pytest.fixture(params=multiprocessing.get_all_start_methods())
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_none_but_the_main_process_ends_a_worker(folder: Path, start_method: str) -> None:
    data = loaded(settings(folder, workers=1))
    batches = data.train.batches(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # as a scheduler does
    worker.join(0.5)
    assert worker.is_alive() and len(list(batches)) == 3
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_epochs_and_seeds_differ(folder: Path) -> None:
    data, other = loaded(settings(folder)), loaded(settings(folder), seed=8)
    orders = [torch.cat([labels for _, labels in batches]).tolist() for batches in
              (data.train.batches(0), data.train.batches(1), other.train.batches(0))]  # fmt: skip
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_each_image_trains_once_an_epoch_and_the_tail_is_dropped(folder: Path) -> None:
    no_aug = settings(folder, no_aug=True)
    images = torch.cat([images for images, _ in loaded(no_aug, batch_size=6).train.batches(0)])
    assert len(images) == 24 and len(images.flatten(1).unique(dim=0)) == 24
    assert [len(labels) for _, labels in loaded(no_aug, batch_size=23).train.batches(0)] == [23]


def test_the_random_numbers_of_the_caller_are_left_alone(folder: Path) -> None:
    for workers in (0, 1):
        data = loaded(settings(folder, workers=workers, **AUGMENTED))
        before = generator_states()
        list(data.train.batches(0)), list(data.validation or ()), list(data.validation_images or ())
        assert generator_states() == before
    first = list(data.train.batches(0))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert same(first, data.train.batches(0))


def test_mixup_and_smoothing_give_soft_labels_for_odd_batches_too(folder: Path) -> None:
    for changes in ({"mixup": 0.4}, {"cutmix": 1.0}, {"smoothing": 0.1}, AUGMENTED):
        for batch_size in (1, 5, 6):
            images, labels = next(loaded(settings(folder, **changes), batch_size=batch_size).train.batches(0))
            assert images.shape == (batch_size, 3, 16, 16) and labels.shape == (batch_size, 4)
            torch.testing.assert_close(labels.sum(1), torch.ones(batch_size))
    _, smooth = next(loaded(settings(folder, smoothing=0.2)).train.batches(0))
    torch.testing.assert_close(smooth.max(1).values, torch.full((5,), 0.85))


def test_mixup_ends_at_its_epoch_and_may_leave_batches_alone(folder: Path) -> None:
    def mixed(epoch: int, **changes: Any) -> bool:
        (_, labels), *_ = loaded(settings(folder, mixup=1.0, no_aug=True, **changes)).train.batches(epoch)
        return bool((labels.max(1).values < 0.999).any())

    assert mixed(0) and mixed(2) and mixed(1, mixup_off_epoch=2)
    assert not mixed(2, mixup_off_epoch=2) and not mixed(0, mixup_prob=0.0)


def test_what_is_erased_is_filled_as_asked(folder: Path) -> None:
    def colors(**changes: Any) -> int:
        """Different values that erasing has put into the first channel of an image, in the image that has most."""
        clean, erased = (
            next(loaded(settings(folder, reprob=reprob, **changes)).train.batches(0))[0][:, 0] for reprob in (0.0, 1.0)
        )
        return max(len(new[new != old].unique()) for old, new in zip(clean, erased, strict=True))

    assert colors() == colors(remode="rand") == 1
    assert 1 < colors(remode="rand", recount=4) <= 4 < colors(remode="pixel")


def test_settings_override_the_networks_preprocessing(folder: Path) -> None:
    data = loaded(settings(folder, mean=[0.0], std=[1.0], interpolation="bicubic", crop_pct=0.5))
    expected = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic", "crop_pct": 0.5}
    assert data.preprocess == CONFIG | expected | {"exif": True}
    images, _ = next(iter(data.validation or ()))
    assert images.min() >= 0 and images.max() <= 1


def test_padding_crop_shifts_the_whole_image(folder: Path) -> None:
    data = loaded(settings(folder, crop_padding=4, hflip=0.0), config=CONFIG | {"input_size": (3, 20, 20)})
    images, _ = next(data.train.batches(0))
    assert images.shape == (5, 3, 20, 20) and (images == -2).any()


# -- images of every kind -------------------------------------------------------------------------------------------


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


def corrupt(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])


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


# -- streams --------------------------------------------------------------------------------------------------------


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


def test_a_stream_that_breaks_off_is_told_from_a_worker_that_dies() -> None:
    def broken(words: str) -> Iterator[int]:
        yield 1
        raise RuntimeError(words)

    with pytest.raises(DataError, match=r"broke off: ValueError: too few shards.*-j 1"):
        list(_read(broken("Caught ValueError in DataLoader worker process 1.\nValueError: too few shards"), 0))
    with pytest.raises(RuntimeError, match="is killed by signal"):
        list(_read(broken("DataLoader worker (pid 12) is killed by signal: Killed."), 0))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["images", "stream"])
def test_workers_that_hang_are_noticed_and_ended(folder: Path, request: pytest.FixtureRequest, kind: str) -> None:
    given = settings(folder, workers=1)
    if kind == "stream":
        shards = request.getfixturevalue("shards")
        splits = {"train_split": "train-{0..1}.tar|24", "val_split": "val-0.tar|9"}
        given = settings(f"wds/{shards}", class_map=str(shards / "classes.txt"), workers=1, **splits)
    with Waiting(5.0) as waiting:
        batches = waiting.over(loaded(given, batch_size=2).train.batches(0))
        next(batches)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGSTOP)
        with pytest.raises(Stuck):
            list(batches)
        assert multiprocessing.active_children() == [] and waiting.seconds > 5


class Current:
    """`torch.cuda.device` on a machine that has none: which GPU is current."""

    index: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        Current.index = self.device.index

    def __exit__(self, *_: object) -> None:
        Current.index = None


def test_what_asks_for_the_current_gpu_is_told_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pinning:
        def __iter__(self) -> Iterator[Any]:
            pinned.append(Current.index)
            for label in (1, 2):
                pinned.append(Current.index)
                yield torch.zeros(2), torch.full((2,), label), []

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: Current.index == 1)
    pinned: list[int | None] = []
    batches = CountedBatches(Pinning(), BadImages(0, "training", (), torch.zeros(0), {}), None, torch.device("cuda:1"))  # type: ignore[arg-type]
    assert [(labels[0].item(), Current.index) for _, labels in batches] == [(1, None), (2, None)]
    assert pinned == [1, 1, 1]
    assert [_precision(None, torch.device(name)) for name in ("cuda:0", "cuda:1")] == [torch.float16, torch.bfloat16]


def test_an_alarm_inside_another_leaves_that_one_its_time() -> None:
    with Alarm(Stuck) as outer:
        outer.set(100)
        with pytest.raises(TimeoutError), Alarm(TimeoutError()) as inner:
            inner.set(0.02)
            time.sleep(50)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 99.98
        reached = []
        with pytest.raises(Stuck):
            outer.set(0.5)
            with Waiting(50.0) as waiting:
                reached += waiting.over([1])
                time.sleep(0.6)
                reached.append(2)  # the outer one, whose time is over, waits for the end of this one
        assert reached == [1, 2]
        with pytest.raises(Stuck):
            time.sleep(50)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


# -- the user's own loaders -----------------------------------------------------------------------------------------


def tensors(count: int = 10, classes: int = 3) -> TensorDataset:
    return TensorDataset(torch.arange(count * 3 * 4 * 4).float().view(count, 3, 4, 4), torch.arange(count) % classes)


def test_a_loader_keeps_its_order_when_it_is_resumed() -> None:
    data = wrap(DataLoader(tensors(), batch_size=4, shuffle=True), DataLoader(tensors(6), batch_size=4), seed=5)
    assert (len(data.train), data.sizes, data.classes) == (3, (10, 6), ("0", "1", "2"))
    assert data.preprocess["input_size"] == (3, 4, 4) and data.validation_images is None
    before = generator_states()
    whole = list(data.train.batches(2))
    assert generator_states() == before
    assert same(whole[1:], data.train.batches(2, start=1)) and not same(whole, data.train.batches(3))
    assert sum(len(labels) for _, labels in data.validation or ()) == 6
    assert same(data.validation or (), data.validation or ())


def test_lists_and_other_iterables_can_be_read_again() -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(batches)

    batches = list(DataLoader(tensors(), batch_size=4))
    for loader in (batches, Stream()):
        data = wrap(loader)
        assert (len(data.train), data.sizes[0], data.validation) == (3, 10, None)
        assert same(data.train.batches(0), batches) and same(data.train.batches(1, 2), batches[2:])


def test_classes_come_from_the_data_set_or_the_argument() -> None:
    dataset = tensors()
    dataset.classes = ["cat", "dog", "bird"]  # type: ignore[attr-defined]
    part = torch.utils.data.Subset(dataset, [0, 3, 4])
    assert wrap(DataLoader(part, batch_size=2)).classes == ("cat", "dog", "bird")
    assert len(wrap(DataLoader(tensors(), batch_size=2), num_classes=7).classes) == 7


def test_samplers_are_told_the_epoch() -> None:
    sampler: Any = torch.utils.data.DistributedSampler(tensors(), num_replicas=1, rank=0)
    data = wrap(DataLoader(tensors(), batch_size=5, sampler=sampler))
    assert not same(data.train.batches(0), data.train.batches(1)) and sampler.epoch == 1


def test_soft_labels_train() -> None:
    data = wrap([(torch.zeros(2, 3, 4, 4), torch.full((2, 4), 0.25))])
    assert len(data.classes) == 4 and next(data.train.batches(0))[1].shape == (2, 4)


IMAGES, LABELS = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (iter([(IMAGES, LABELS)]), "only once.*DataLoader"),
        (((IMAGES, LABELS) for _ in range(2)), "only once.*DataLoader"),
        (5, "int, which cannot be iterated over"),
        (Dataset(), "cannot be iterated over; expected a torch DataLoader"),
        ([], "is empty"),
        ([IMAGES], "gave a Tensor; expected two tensors"),
        ([(IMAGES, LABELS, LABELS)], r"tuple of \(Tensor, Tensor, Tensor\)"),
        ([(IMAGES, [0, 1])], r"tuple of \(Tensor, list\)"),
        ([(IMAGES[0], LABELS)], r"shape \(3, 4, 4\)"),
        ([(IMAGES.byte(), LABELS)], "torch.uint8; expected float"),
        ([(IMAGES, LABELS.int())], r"torch.int32.*labels.long\(\)"),
        ([(IMAGES, LABELS[:1])], "for 2 images"),
        ([(IMAGES, LABELS - 1)], "from -1 to 0"),
        ([(IMAGES, LABELS * 0)], "one class only"),
    ],
)
def test_loaders_that_cannot_be_trained_on(loader: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        wrap(loader)


def test_labels_that_the_network_does_not_have_are_refused_when_met() -> None:
    late = [(IMAGES, LABELS), (IMAGES, LABELS + 4)]
    with pytest.raises(DataError, match="from 4 to 5; expected 0 to 1"):
        list(wrap(late, num_classes=2).train.batches(0))
    with pytest.raises(DataError, match="validation loader gave labels from 4 to 5"):
        wrap([(IMAGES, LABELS)], late[1:])


def test_an_iterable_that_runs_dry_is_an_error_not_a_short_epoch() -> None:
    class Dry:
        def __init__(self) -> None:
            self.batches = iter([(IMAGES, LABELS)] * 3)

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return self.batches

    with pytest.raises(DataError, match=r"none in epoch 0.*read again"):
        list(wrap(Dry()).train.batches(0))
