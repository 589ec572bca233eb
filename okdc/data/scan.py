"""The images in the folders of one split."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from okdc.data.images import PAGES
from okdc.data.names import listed, natural_key, spelled
from okdc.data.pixel_bits import DEEP_COLOURS
from okdc.data.values import log
from okdc.errors import DataError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif"),
    *(".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".jp2", ".tga", ".mpo"),
    *(".heic", ".heif"),
)

SYSTEM = (
    *(".", "__MACOSX", "Icon\r", "@eaDir", "lost+found"),
    *("Thumbs.db", "ehthumbs", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"),
)

LFS = b"version https://git-lfs"

Place = tuple[str, ...]  # the folders from the split down to the one that is meant
Naming = Callable[[Place], str]  # the class of the images there


@dataclass
class Scan:
    """What there is below `folder`: the images of each folder that holds some, and what is not looked at.

    `others` counts the files that are no images by how their names end, `links` are those that were not followed.
    """

    folder: Path
    images: dict[Place, list[str]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)


class Files:
    """Image files in natural order of their paths: (PIL image, class index) by position."""

    def __init__(self, folder: Path, paths: list[str], labels: list[int]):
        self.folder, self.paths, self.targets = folder, paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with open(self.filename(index), "rb") as file:
            if file.read(len(LFS)) == LFS:
                raise OSError("it is a pointer of Git LFS, not the image: git lfs pull")
            if file.name.lower().endswith((".heic", ".heif")):
                _learn_heic()
            file.seek(0)
            with Image.open(file) as image:
                # Phones keep a depth map or a second view behind a photo (MPO), which is no page.
                image.info[PAGES] = image.format != "MPO" and getattr(image, "is_animated", False)
                image.info[DEEP_COLOURS] = ";16" in str(image.tile) and not image.mode.startswith("I")
                image.load()
        return image, self.targets[index]

    def __getstate__(self) -> dict[str, Any]:
        """Packed: of millions of images, lists of paths and labels take time to send to other processes.

        By numpy: a tensor made here would be gone, and its shared memory with it, when a spawned process opens it.
        """
        return {
            "folder": self.folder, "count": len(self), "paths": os.fsencode("\0".join(self.paths)),
            "targets": self.labels.numpy(),
        }  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        paths = os.fsdecode(state["paths"]).split("\0") if state["count"] else []
        self.folder, self.paths, self.targets = state["folder"], paths, state["targets"].tolist()

    def filename(self, index: int, absolute: bool = True) -> str:
        """The path of an image, from the split on where it is not to be `absolute`."""
        return os.path.join(self.folder, self.paths[index]) if absolute else self.paths[index]

    @property
    def labels(self) -> Tensor:
        """The class index of each image, (N,) int64."""
        return torch.tensor(self.targets, dtype=torch.int64)


def _learn_heic() -> None:
    """Let Pillow read HEIC; OSError where the package that can is not installed."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise OSError("HEIC needs a decoder: pip install pillow-heif") from error


def is_visible(name: str) -> bool:
    """Whether a file or folder is the user's own, not a system's: macOS keeps a ._cat.png beside cat.png."""
    return not name.startswith(SYSTEM)


def folders(root: Path) -> list[str]:
    """The names of the folders in one, in natural order; DataError where it may not be read."""
    return [entry.name for entry in _inner(entries(root))]


def entries(root: Path) -> list[os.DirEntry[str]]:
    """What is in a folder and the user's own; DataError where it may not be read."""
    try:
        with os.scandir(root) as found:
            return [entry for entry in found if is_visible(entry.name)]
    except OSError as error:
        raise DataError(f"the folder '{root}' cannot be read ({error.strerror}): see to its permissions.") from error


def is_image(name: str) -> bool:
    """Whether a file is an image, by how its name ends."""
    return name.lower().endswith(EXTENSIONS)


def _inner(here: list[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
    # DirEntry.is_dir() raises where a link leads to itself.
    inner = [entry for entry in here if (os.path.isdir(entry) if entry.is_symlink() else entry.is_dir())]
    return sorted(inner, key=lambda entry: natural_key(entry.name))


def scan(folder: Path) -> Scan:
    """Find the images below a folder; links are followed out of it, but not back, or images would come twice."""
    found = Scan(folder)
    _walk(folder, (), (folder.resolve(),), found)
    if found.links:
        log.warning("links that lead back into '%s' are not followed: %s", folder, listed(found.links))
    if found.others:
        kinds = [f"{count} of {kind}" for kind, count in sorted(found.others.items(), key=lambda x: (-x[1], x[0]))]
        log.warning("files beside the images of '%s' are left out: %s", folder, listed(kinds, 20))
    return found


def _walk(path: Path, place: Place, above: tuple[Path, ...], found: Scan) -> None:
    """`above` are the folder itself and those that it is in, without links, the split's first."""
    here = entries(path)
    inner = _inner(here)
    names = {entry.name for entry in here} - {entry.name for entry in inner}
    if images := list(filter(is_image, names)):
        found.images[place] = images
    if place:
        found.others.update(os.path.splitext(name)[1].lower() or "no ending" for name in names.difference(images))
    for entry in inner:
        real = Path(entry.path).resolve() if entry.is_symlink() else above[-1] / entry.name
        if entry.is_symlink() and _leads_back(real, above):
            found.links.append("/".join((*place, entry.name)))
        else:
            _walk(path / entry.name, (*place, entry.name), (*above, real), found)


def _leads_back(target: Path, above: tuple[Path, ...]) -> bool:
    return target.is_relative_to(above[0]) or any(folder.is_relative_to(target) for folder in above)


def files(found: Scan, classes: dict[str, int], name_of: Naming) -> Files:
    """The images of those folders whose class is one of `classes`."""
    samples = [
        ("/".join((*place, image)), classes[name])
        for place, images in found.images.items()
        if (name := spelled(name_of(place))) in classes
        for image in images
    ]
    samples.sort(key=lambda sample: natural_key(sample[0]))
    return Files(found.folder, [path for path, _ in samples], [label for _, label in samples])
