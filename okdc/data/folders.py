"""A folder of images: train/ and val/ of class folders, or class folders alone."""

from __future__ import annotations

import re
from pathlib import Path

from timm.data.readers.class_map import load_class_map

from okdc.data import splits
from okdc.data.images import Images, names_by_index, split_in_two
from okdc.data.names import by_index, is_line, listed, spelled
from okdc.data.scan import EXTENSIONS, Naming, Place, Scan, files, folders, scan
from okdc.data.values import Source, log
from okdc.errors import DataError
from okdc.recipe import DataSettings

# As macOS, Windows and Linux call a copy of a folder.
COPY = re.compile(r"copy of (.+)|(.+?)(?: - copy| copy| \(copy\))?(?: ?\(\d+\)| \d+)?", re.IGNORECASE)


def open_folder(settings: DataSettings) -> Source:
    """The images below `settings.data`; raises DataError where the folders are not laid out as expected."""
    name = Path(settings.data).expanduser().resolve().name
    train_images, classes, validation = open_training(settings)
    if validation is None:
        return split_in_two(train_images, names_by_index(classes), name)
    named = classes if settings.class_map else None
    validation_images, there = _open(validation, named, settled=True)
    _check_same_classes(train_images.origin, classes, str(validation), there)
    return Source(train_images, validation_images, names_by_index(classes), name)


def open_training(settings: DataSettings) -> tuple[Images, dict[str, int], Path | None]:
    """The images to train on, class -> index, and the folder that is to validate, if any; DataError as above."""
    root = Path(settings.data).expanduser()
    splits.check_path(root, settings.data)
    named = read_class_map(settings.class_map, root) if settings.class_map else None
    flat = named is not None and splits.lists_all(root, named)
    train, validation = (None, None) if flat else splits.choose(root, settings)
    return *_open(train or root, named, settled=flat or train is not None), validation


def _open(folder: Path, named: dict[str, int] | None, settled: bool) -> tuple[Images, dict[str, int]]:
    """The images of a split, and class -> index, in natural order where it is not `named`.

    That it is one split is `settled`, or to be asked.
    """
    found = scan(folder)
    if not settled:
        splits.check_flat(found)
    _check_layout(found)
    name_of = _naming(found, named or {})
    names = {name_of(place) for place in found.images}
    classes = by_index(map(spelled, names)) if named is None else named
    dataset = files(found, classes, name_of)
    if not len(dataset):
        raise DataError(
            f"the class map and '{folder}' have no class in common: the map names {listed(classes)}, the folders are "
            f"{listed(folders(folder))}. Expected the names of the folders, one per line: --class-map FILE.txt"
        )
    if named is None:
        _check_names(names, folder)
        _warn_of_copies(names, folder)
    elif unnamed := [name for name in by_index(names) if spelled(name) not in named]:
        log.warning("the class map leaves out images of '%s': %s", folder, listed(unnamed))
    return Images(dataset, dataset.labels, str(folder)), classes


def _check_layout(found: Scan) -> None:
    """Raise DataError for images or folders that are out of place."""
    layout = f"expected one folder per class, as in {found.folder / 'cat' / '1.jpg'}"
    if () in found.images:
        raise DataError(
            f"'{found.folder}' holds images {'beside its' if len(found.images) > 1 else 'but no'} class folders; "
            f"{layout}. Move each image into the folder of its class, or list them with their labels: --data "
            "FILE.csv, or --val-split FILE.csv for those that validate."
        )
    if not found.images:
        raise DataError(
            f"'{found.folder}' is empty: no folder in it holds an image ({', '.join(EXTENSIONS)}); {layout}. Check "
            "--data."
        )
    filled = {place[0] for place in found.images} | set(found.links)
    if empty := [name for name in folders(found.folder) if name not in filled]:
        raise DataError(
            f"no image in class folder {listed(empty)} of '{found.folder}'; expected at least one file that ends in "
            f"{', '.join(EXTENSIONS)}. Add images or delete the folder."
        )


def _first(place: Place) -> str:
    return place[0]


def _last(place: Place) -> str:
    return place[-1]


def _naming(found: Scan, named: dict[str, int]) -> Naming:
    """Which folder is the class: the first level, as torchvision reads it, unless only the last is `named`.

    DataError where all images are deeper and it may as well be those folders that are the classes.
    """
    first, last = ({spelled(name_of(place)) for place in found.images} for name_of in (_first, _last))
    if named:
        return _first if first & named.keys() or not last & named.keys() else _last
    owners: dict[str, set[str]] = {}
    for place in found.images:
        owners.setdefault(place[1] if len(place) > 1 else "", set()).add(place[0])
    if "" in owners or max(map(len, owners.values())) > 1 or len(owners) == len(first):
        return _first
    if len(first) == 1:
        (only,) = first
        raise DataError(
            f"'{found.folder}' holds one folder only, '{only}', and class folders are in that ({listed(owners)}). Move "
            f"them up, or name '{only}' too: with --data, or with --train-split and --val-split."
        )
    raise DataError(
        f"the folders of '{found.folder}' hold folders, and either may be the classes: {len(first)} of the first level "
        f"({listed(by_index(first))}) or {len(owners)} inside ({listed(owners)}). Say which: list them in a file, one "
        "per line (--class-map FILE.txt), or move the images up."
    )


def _check_names(names: set[str], folder: Path) -> None:
    if twice := [spelled(name) for name in sorted(names) if name != spelled(name) and spelled(name) in names]:
        raise DataError(
            f"'{folder}' has two folders that are both called {listed(twice)}, spelled with other bytes (Unicode NFC "
            "and NFD); expected one folder per class. Put their images together."
        )
    for name in sorted(names):
        if not is_line(name):
            raise DataError(
                f"the class folder {name!r} of '{folder}' has a name that is no line of text, and it is to be one of "
                "labels.txt: rename it."
            )


def _warn_of_copies(names: set[str], folder: Path) -> None:
    """Say which class folders a file manager made of others."""
    copies = [
        name for name in by_index(names) if (match := COPY.fullmatch(name)) and {*match.groups()} & (names - {name})
    ]
    if copies:
        log.warning(
            "class folders of '%s' that look like copies of others are classes of their own: %s", folder, listed(copies)
        )


def read_class_map(path: str, root: Path) -> dict[str, int]:
    """Class name -> index, from a file as it is named or in the folder `root`; DataError where it cannot be read."""
    try:
        named = load_class_map(path, str(root))
    except (AssertionError, OSError, ValueError) as error:
        raise DataError(
            f"cannot read the class map '{path}' ({error}); expected a text file with one class name per line: "
            "--class-map FILE.txt"
        ) from error
    # Some editors begin a file with a byte order mark, or end it with empty lines.
    clean = {spelled(str(name)).strip("\ufeff"): index for name, index in named.items()}
    return {name: index for name, index in clean.items() if name}


def _shown(name: str) -> str:
    return name if name == name.strip() else repr(name)


def _check_same_classes(train: str, classes: dict[str, int], validation: str, there: dict[str, int]) -> None:
    alone = {train: sorted(set(classes) - set(there)), validation: sorted(set(there) - set(classes))}
    parts = [f"only in {folder}: {listed(map(_shown, names))}" for folder, names in alone.items() if names]
    if parts:
        inner = {spelled(name) for outer in folders(Path(train)) for name in folders(Path(train) / outer)}
        deeper = (
            f" In the folders of '{train}' are these classes? List them in a file, one per line: --class-map FILE.txt"
        )
        raise DataError(
            f"training and validation do not have the same classes ({'; '.join(parts)}); expected the same class "
            "folders in both. Rename, add or delete folders until they agree."
            f"{deeper if inner >= set(there) else ''}"
        )
