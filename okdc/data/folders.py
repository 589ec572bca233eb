"""A folder of images: train/ and val/ of class folders, or class folders alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key

from okdc.data.images import Images, labels_of, listed, names_by_index, split_in_two
from okdc.data.values import Source
from okdc.errors import DataError, nearest
from okdc.recipe import DataSettings

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "val", "valid", "test")


def open_folder(settings: DataSettings) -> Source:
    """The images below `settings.data`; raises DataError where the folders are not laid out as expected."""
    root = Path(settings.data).expanduser()
    _check_path(root, settings.data)
    train, validation = _split_folders(root, settings)
    name = root.resolve().name
    classes = _classes(train or root)
    if settings.class_map:
        classes = _read_class_map(settings.class_map, root)
    train_images = _open(train or root, classes)
    if validation is None:
        return split_in_two(train_images, names_by_index(classes), name)
    there = _classes(validation)
    if not settings.class_map:
        _check_same_classes(str(train), classes, str(validation), there)
    return Source(train_images, _open(validation, classes), names_by_index(classes), name)


def _check_path(root: Path, given: str) -> None:
    if root.is_file():
        raise DataError(
            f"--data '{given}' is a file; expected a folder with train/ and val/. Unpack it, then name the folder."
        )
    if not root.exists():
        found = next(parent for parent in root.absolute().parents if parent.is_dir())
        hint = nearest(root.name, _folders(found)) or nearest(given, ["digits"])
        if _first(found, TRAIN_NAMES):
            hint = f" '{found}' has a train/ folder: --data {found}"
        raise DataError(
            f"--data '{given}' does not exist ('{found}' does); expected a folder with train/ and val/ of class "
            f"folders, digits, torch/NAME, hfds/ID or wds/PATH.{hint}"
        )
    above = root.absolute().parent
    if (
        root.name in (*TRAIN_NAMES, *VALIDATION_NAMES)
        and _first(above, TRAIN_NAMES)
        and _first(above, VALIDATION_NAMES)
    ):
        raise DataError(f"'{root}' is one split of '{above}'; expected the folder that holds both: --data {above}")
    inner = _folders(root)
    if len(inner) == 1 and inner[0] not in TRAIN_NAMES and _first(root / inner[0], TRAIN_NAMES):
        raise DataError(f"'{root}' itself has no train/, but the only folder in it does: --data {root / inner[0]}")


def _split_folders(root: Path, settings: DataSettings) -> tuple[Path | None, Path | None]:
    defaults = DataSettings()
    custom_train, custom_val = settings.train_split != defaults.train_split, settings.val_split != defaults.val_split
    train = _first(root, [settings.train_split] if custom_train else TRAIN_NAMES)
    validation = _first(root, [settings.val_split] if custom_val else VALIDATION_NAMES)
    for flag, name, path, custom in (
        ("--train-split", settings.train_split, train, custom_train or validation is not None),
        ("--val-split", settings.val_split, validation, custom_val),
    ):
        if custom and path is None:
            raise DataError(
                f"'{root}' has no folder '{name}'; it has {listed(_folders(root)) or 'no folders'}. Expected one of "
                f"class folders to {'train on' if 'train' in flag else 'validate with'}: {flag} "
                f"NAME.{nearest(name, _folders(root))}"
            )
    return train, validation


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and _is_visible(path.name))


def _is_visible(name: str) -> bool:
    return not name.startswith((".", "__MACOSX"))


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if name and (root / name).is_dir() and _is_split(root / name)), None)


def _is_split(path: Path) -> bool:
    # A class may be called train (CIFAR-100 has one): then it holds no folders and stands among other classes.
    return bool(_folders(path)) or set(_folders(path.parent)) <= {path.name, *TRAIN_NAMES, *VALIDATION_NAMES}


def _classes(folder: Path) -> dict[str, int]:
    """Class folder -> index, in natural order; raises DataError for images or folders that are out of place."""
    filled, leaves = set(), set()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if _is_visible(name)]
        if any(file.lower().endswith(EXTENSIONS) for file in files):
            filled.add(Path(path))
        elif not folders:
            leaves.add(Path(path))
    layout = f"expected one folder per class, as in {folder / 'cat' / '1.jpg'}"
    if folder in filled:
        raise DataError(
            f"'{folder}' holds images {'beside its' if len(filled) > 1 else 'but no'} class folders; {layout}. Move "
            "each image into the folder of its class."
        )
    names = {path.name for path in filled}
    if not names:
        raise DataError(
            f"'{folder}' is empty: no folder in it holds an image ({', '.join(EXTENSIONS)}); {layout}. Check --data."
        )
    if empty := sorted({path.name for path in leaves} - names):
        raise DataError(
            f"no image in class folder {listed(empty)} of '{folder}'; expected at least one file that ends in "
            f"{', '.join(EXTENSIONS)}. Add images or delete the folder."
        )
    return {name: index for index, name in enumerate(sorted(names, key=natural_key))}


def _read_class_map(path: str, root: Path) -> dict[str, int]:
    try:
        return load_class_map(path, str(root))
    except (AssertionError, OSError, ValueError) as error:
        raise DataError(
            f"cannot read the class map '{path}' ({error}); expected a text file with one class name per line: "
            "--class-map FILE.txt"
        ) from error


def _open(folder: Path, classes: dict[str, int]) -> Images:
    try:
        dataset = create_dataset(
            "", root=str(folder), search_split=False, class_map=classes, input_key=";".join(EXTENSIONS)
        )
    except RuntimeError as error:
        raise DataError(
            f"the class map and '{folder}' have no class in common: the map names {listed(classes)}, the folders are "
            f"{listed(_folders(folder))}. Expected the names of the folders, one per line: --class-map FILE.txt"
        ) from error
    return Images(dataset, labels_of(dataset, str(folder)), str(folder))


def _check_same_classes(train: str, classes: dict[str, int], validation: str, there: dict[str, int]) -> None:
    alone = {train: sorted(set(classes) - set(there)), validation: sorted(set(there) - set(classes))}
    parts = [f"only in {folder}: {listed(names)}" for folder, names in alone.items() if names]
    if parts:
        raise DataError(
            f"training and validation do not have the same classes ({'; '.join(parts)}); expected the same class "
            "folders in both. Rename, add or delete folders until they agree."
        )
