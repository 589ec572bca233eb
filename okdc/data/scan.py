"""The images in the folders of one split."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from okdc.data.names import natural_key, spelled
from okdc.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")

Place = tuple[str, ...]  # the folders from the split down to the one that is meant


@dataclass
class Scan:
    """What there is below `folder`: the images of each folder that holds some, and folders that hold nothing."""

    folder: Path
    images: dict[Place, list[str]] = field(default_factory=dict)
    empty: list[Place] = field(default_factory=list)


class Files:
    """Image files in natural order of their paths: (PIL image, class index) by position."""

    def __init__(self, folder: Path, paths: list[str], labels: list[int]):
        self.folder, self.paths, self.targets = folder, paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self.filename(index)) as image:
            image.load()
        return image, self.targets[index]

    def filename(self, index: int, absolute: bool = True) -> str:
        """The path of an image, from the split on where it is not to be `absolute`."""
        return os.path.join(self.folder, self.paths[index]) if absolute else self.paths[index]

    @property
    def labels(self) -> Tensor:
        """The class index of each image, (N,) int64."""
        return torch.tensor(self.targets, dtype=torch.int64)


def is_visible(name: str) -> bool:
    """Whether a folder is the user's own, not a system's."""
    return not name.startswith((".", "__MACOSX"))


def folders(root: Path) -> list[str]:
    """The names of the folders in one, in natural order; DataError where it may not be read."""
    return sorted((entry.name for entry in entries(root) if entry.is_dir() and is_visible(entry.name)), key=natural_key)


def entries(root: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, in natural order; DataError where it may not be read."""
    try:
        with os.scandir(root) as found:
            return sorted(found, key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise DataError(f"the folder '{root}' cannot be read ({error.strerror}): see to its permissions.") from error


def scan(folder: Path) -> Scan:
    """Find the images below a folder."""
    found = Scan(folder)
    _walk(folder, (), found)
    return found


def _walk(path: Path, place: Place, found: Scan) -> None:
    here = entries(path)
    inner = [entry for entry in here if entry.is_dir() and is_visible(entry.name)]
    if images := [entry.name for entry in here if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir()]:
        found.images[place] = images
    elif not inner:
        found.empty.append(place)
    for entry in inner:
        _walk(path / entry.name, (*place, entry.name), found)


def files(found: Scan, classes: dict[str, int], name_of: Callable[[Place], str]) -> Files:
    """The images of those folders whose class is one of `classes`."""
    samples = [
        ("/".join((*place, image)), classes[name])
        for place, images in found.images.items()
        if (name := spelled(name_of(place))) in classes
        for image in images
    ]
    samples.sort(key=lambda sample: natural_key(sample[0]))
    return Files(found.folder, [path for path, _ in samples], [label for _, label in samples])
