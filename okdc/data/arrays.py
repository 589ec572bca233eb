"""Images and labels in one NumPy file, as MedMNIST and Keras keep them."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from okdc.data.folders import read_class_map
from okdc.data.images import Images, names_by_index, split_in_two
from okdc.data.names import listed
from okdc.data.values import Source, log
from okdc.errors import DataError
from okdc.recipe import DataSettings

KEYS = {"train": ("train_images", "x_train"), "val": ("val_images", "x_val"), "test": ("test_images", "x_test")}
EXPECTED = (
    "expected train_images (N, H, W) or (N, H, W, 3) of uint8 and train_labels (N,) or (N, 1) of integers, and the "
    "same of val or test, as MedMNIST has them, or x_train, y_train, x_test and y_test, as Keras does"
)


class Arrays:
    """(PIL image, class index) by position, of images (N, H, W) or (N, H, W, 3) uint8 and labels (N,)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.targets = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]


def is_arrays(given: str) -> bool:
    """Whether such a file is named, by how its name ends."""
    return given.lower().endswith(".npz") and Path(given).expanduser().is_file()


def open_arrays(settings: DataSettings) -> Source:
    """The images in the file `settings.data`; DataError for what is no such file."""
    path = Path(settings.data).expanduser()
    found = {split: images for split, keys in KEYS.items() if (images := _split(path, keys))}
    train = found.pop("train", None)
    if train is None or settings.train_split != DataSettings().train_split:
        raise DataError(f"'{path}' has no split '{settings.train_split}' of images to train on; {EXPECTED}.")
    asked = settings.val_split if settings.val_split != DataSettings().val_split else next(iter(found), "val")
    if found and asked not in found:
        raise DataError(f"'{path}' has no split '{asked}', but {listed(found)}: --val-split {next(iter(found))}")
    highest = max(int(images.labels.max()) for images in (train, *found.values()))
    names = read_class_map(settings.class_map, path.parent) if settings.class_map else None
    classes = names_by_index(names or {str(i): i for i in range(highest + 1)})
    if not found:
        return split_in_two(train, classes, path.name)
    if unused := [split for split in found if split not in (asked, "test")]:
        log.warning("splits of '%s' that are not used: %s", path, listed(unused))
    return Source(train, found[asked], classes, path.name)


def _split(path: Path, keys: tuple[str, ...]) -> Images | None:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            key = next((key for key in keys if key in file), None)
            if key is None:
                return None
            images, labels = file[key], file[key.replace("images", "labels").replace("x_", "y_")]
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read ({type(error).__name__}: {error}); {EXPECTED}.") from error
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    fits = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    integers = np.issubdtype(labels.dtype, np.integer)
    if not fits or images.dtype != np.uint8 or labels.shape != images.shape[:1] or not integers or not len(labels):
        raise DataError(
            f"'{path}' has {key} of shape {images.shape} and type {images.dtype}, with labels of shape {labels.shape} "
            f"and type {labels.dtype}; {EXPECTED}."
        )
    dataset = Arrays(images, labels.astype(np.int64))
    return Images(dataset, torch.tensor(dataset.targets), f"{path} ({key})")
