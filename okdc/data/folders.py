"""A folder of images: train/ and val/ of class folders, or class folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm.data.readers.class_map import load_class_map

from okdc.data.images import Images, listed, names_by_index, split_in_two
from okdc.data.names import by_index, spelled
from okdc.data.scan import EXTENSIONS, Scan, files, folders, scan
from okdc.data.values import Source
from okdc.errors import DataError, nearest
from okdc.recipe import DataSettings

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "val", "valid", "test")


def open_folder(settings: DataSettings) -> Source:
    """The images below `settings.data`; raises DataError where the folders are not laid out as expected."""
    root = Path(settings.data).expanduser()
    _check_path(root, settings.data)
    train, validation = _split_folders(root, settings)
    name = root.resolve().name
    found = scan(train or root)
    classes = _classes(found)
    if settings.class_map:
        classes = _read_class_map(settings.class_map, root)
    train_images = _open(found, classes)
    if validation is None:
        return split_in_two(train_images, names_by_index(classes), name)
    found = scan(validation)
    there = _classes(found)
    if not settings.class_map:
        _check_same_classes(str(train), classes, str(validation), there)
    return Source(train_images, _open(found, classes), names_by_index(classes), name)


def _check_path(root: Path, given: str) -> None:
    if root.is_file():
        raise DataError(
            f"--data '{given}' is a file; expected a folder with train/ and val/. Unpack it, then name the folder."
        )
    if not root.exists():
        found = next(parent for parent in root.absolute().parents if parent.is_dir())
        hint = nearest(root.name, folders(found)) or nearest(given, ["digits"])
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
    inner = folders(root)
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
                f"'{root}' has no folder '{name}'; it has {listed(folders(root)) or 'no folders'}. Expected one of "
                f"class folders to {'train on' if 'train' in flag else 'validate with'}: {flag} "
                f"NAME.{nearest(name, folders(root))}"
            )
    return train, validation


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if name and (root / name).is_dir() and _is_split(root / name)), None)


def _is_split(path: Path) -> bool:
    # A class may be called train (CIFAR-100 has one): then it holds no folders and stands among other classes.
    return bool(folders(path)) or set(folders(path.parent)) <= {path.name, *TRAIN_NAMES, *VALIDATION_NAMES}


def _classes(found: Scan) -> dict[str, int]:
    """Class -> index, in natural order; raises DataError for images or folders that are out of place."""
    layout = f"expected one folder per class, as in {found.folder / 'cat' / '1.jpg'}"
    if () in found.images:
        raise DataError(
            f"'{found.folder}' holds images {'beside its' if len(found.images) > 1 else 'but no'} class folders; "
            f"{layout}. Move each image into the folder of its class."
        )
    if not found.images:
        raise DataError(
            f"'{found.folder}' is empty: no folder in it holds an image ({', '.join(EXTENSIONS)}); {layout}. Check "
            "--data."
        )
    _check_spelling(found)
    names = {spelled(place[-1]) for place in found.images}
    if empty := sorted({spelled(place[-1]) for place in found.empty} - names):
        raise DataError(
            f"no image in class folder {listed(empty)} of '{found.folder}'; expected at least one file that ends in "
            f"{', '.join(EXTENSIONS)}. Add images or delete the folder."
        )
    return by_index(names)


def _check_spelling(found: Scan) -> None:
    names = sorted({place[-1] for place in found.images})
    if twice := [spelled(name) for name in names if name != spelled(name) and spelled(name) in names]:
        raise DataError(
            f"'{found.folder}' has two folders that are both called {listed(twice)}, spelled with other bytes (Unicode "
            "NFC and NFD); expected one folder per class. Put their images together."
        )
    for name in names:
        if name.splitlines() != [name] or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise DataError(
                f"the class folder {name!r} of '{found.folder}' has a name that is no line of text, and it is to be "
                "one of labels.txt: rename it."
            )


def _read_class_map(path: str, root: Path) -> dict[str, int]:
    try:
        return {spelled(str(name)): index for name, index in load_class_map(path, str(root)).items()}
    except (AssertionError, OSError, ValueError) as error:
        raise DataError(
            f"cannot read the class map '{path}' ({error}); expected a text file with one class name per line: "
            "--class-map FILE.txt"
        ) from error


def _open(found: Scan, classes: dict[str, int]) -> Images:
    dataset = files(found, classes, lambda place: place[-1])
    if not len(dataset):
        raise DataError(
            f"the class map and '{found.folder}' have no class in common: the map names {listed(classes)}, the folders "
            f"are {listed(folders(found.folder))}. Expected the names of the folders, one per line: --class-map "
            "FILE.txt"
        )
    return Images(dataset, dataset.labels, str(found.folder))


def _check_same_classes(train: str, classes: dict[str, int], validation: str, there: dict[str, int]) -> None:
    alone = {train: sorted(set(classes) - set(there)), validation: sorted(set(there) - set(classes))}
    parts = [f"only in {folder}: {listed(names)}" for folder, names in alone.items() if names]
    if parts:
        raise DataError(
            f"training and validation do not have the same classes ({'; '.join(parts)}); expected the same class "
            "folders in both. Rename, add or delete folders until they agree."
        )
