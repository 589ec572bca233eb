"""Which folders are splits: found by their names as people write them, and asked about where names do not say it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from okdc.data.names import listed, spelled
from okdc.data.scan import Scan, entries, folders, is_image
from okdc.data.values import log
from okdc.errors import DataError, nearest
from okdc.recipe import DataSettings

# What a split is for, and what it is called; of several the first is taken.
ROLES = {
    "training": ("train", "training", "trn"),
    "validation": ("validation", "val", "valid", "dev", "devel", "eval", "evaluation", "holdout"),
    "test": ("test", "testing", "tst"),
}

FOLDS = " To train on several, move them into one train/, and list the classes in a file: --class-map FILE.txt"


def role(name: str) -> str | None:
    """What a split of that name is for: `training` of train2017, Train_Images, trainset; None of what is no such name.

    A name of two roles, such as trainval, has none.
    """
    words = {
        re.sub("(data|dataset|set|image|img|split)s?$", "", w.lower()) for w in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
    }
    found = [role for role, known in ROLES.items() if not words.isdisjoint(known)]
    return found[0] if len(found) == 1 else None


def check_path(root: Path, given: str) -> None:
    """Raise DataError for what is no folder, and for one that is a level too high or too low."""
    if not root.exists():
        found = next(parent for parent in root.absolute().parents if parent.is_dir())
        hint = nearest(root.name, folders(found), alike=0.7) or nearest(given, ["digits"], alike=0.7)
        if _splits(found, "training"):
            hint = f" '{found}' has a train/ folder: --data {found}"
        raise DataError(
            f"--data '{given}' does not exist ('{found}' does); expected a folder with train/ and val/ of class "
            f"folders, labels as .csv, .tsv or .json, arrays as .npz, digits, torch/NAME, hfds/ID or wds/PATH.{hint}"
        )
    above = root.absolute().parent
    if (
        role(root.name)
        and os.access(above, os.R_OK)
        and any(
            role(name) != role(root.name) and set(folders(root)) & set(folders(above / name))
            for name in _splits(above, *ROLES)
        )
    ):
        raise DataError(f"'{root}' is one split of '{above}'; expected the folder that holds both: --data {above}")


def choose(root: Path, settings: DataSettings) -> tuple[Path | None, Path | None]:
    """The folders that train and validate, each None where there is none; DataError where that is to be asked."""
    default = DataSettings()
    custom_train, custom_val = settings.train_split != default.train_split, settings.val_split != default.val_split
    train = _named(root, settings.train_split) if custom_train else _found(root, "training", "--train-split")
    validation = _named(root, settings.val_split) if custom_val else _validation(root, train)
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
    if train is not None and not custom_train:
        _check_beside(root, train, validation)
    if train and validation and train.resolve() == validation.resolve():
        log.warning("'%s' trains and validates: how good the student is on new images is not measured", validation)
    return train, validation


def _named(root: Path, name: str) -> Path | None:
    return root / name if name and (root / name).is_dir() else None


def _splits(root: Path, *roles: str) -> list[str]:
    """The folders that are named as one of these and look like a split."""
    there = folders(root)
    # A class may be called train (CIFAR-100 has one): then it holds no folders and stands among other classes.
    alone = all(map(role, there))
    return [name for name in there if role(name) in roles and (alone or folders(root / name))]


def _found(root: Path, wanted: str, flag: str, but: Sequence[str] = ()) -> Path | None:
    """The split of a role; of several the one that is called as usual."""
    names = [name for name in _splits(root, wanted) if name not in but]
    usual = [name for name in ROLES[wanted] if name in names]
    if not usual and len(names) > 1:
        raise DataError(
            f"'{root}' has {len(names)} folders for {wanted} ({listed(names)}); expected one. Say which: {flag} "
            f"{names[0]}, or move the others out.{FOLDS if wanted == 'training' else ''}"
        )
    return root / (usual or names)[0] if names else None


def _validation(root: Path, train: Path | None) -> Path | None:
    but = [train.relative_to(root).parts[0]] if train else []
    found = _found(root, "validation", "--val-split", but)
    test = None if found else _found(root, "test", "--val-split", but)
    if train and test and _holds_images(test) and not folders(test):
        log.warning("'%s' holds images without class folders, and is not used", test)
        return None
    return found or test


def _check_beside(root: Path, train: Path, validation: Path | None) -> None:
    """Ask about folders beside `train` that may validate too, or be classes as `train` is."""
    classes = set(folders(train))
    beside = [name for name in folders(root) if root / name not in (train, validation)]
    alike = [name for name in beside if len(classes & set(folders(root / name))) > 1]
    if alike and validation is None:
        raise DataError(
            f"'{train.name}' and '{alike[0]}' of '{root}' hold folders of the same names; is the second to validate "
            f"(--val-split {alike[0]}), or is it not to be used? Then move it out of '{root}'."
        )
    if other := [name for name in alike if role(name) != "test"]:
        log.warning("of '%s', not used: %s", root, listed(other))
    loose = [name for name in beside if role(name) is None and _holds_images(root / name)]
    if loose and validation is None:
        raise DataError(
            f"'{train.name}' of '{root}' holds folders, and {listed(loose)} beside it images: is '{train.name}' the "
            "training split, or one class of several? List the classes in a file, one per line (--class-map "
            f"FILE.txt), or move {listed(loose)} out."
        )


def _holds_images(folder: Path) -> bool:
    return any(is_image(entry.name) for entry in entries(folder))


def check_flat(found: Scan) -> None:
    """Raise DataError where the folders beside one another are no classes: splits by other names, or full of splits."""
    inside: dict[str, set[str]] = {}
    for place in found.images:
        if len(place) > 1:
            inside.setdefault(place[0], set()).add(place[1])
    root, roles = found.folder, {name: {role(inner) for inner in below} for name, below in inside.items()}
    full = [
        name
        for name, there in roles.items()
        if "training" in there and (len(there - {None}) > 1 or (len(inside) == 1 and None not in there))
    ]
    if len(full) == 1:
        _send_inside(found, full[0])
    if full:
        raise DataError(
            f"'{root}' has no train/, but each of {listed(full)} in it holds {listed(sorted(inside[full[0]]))}. Are "
            f"they data sets (--data {root / full[0]}), or classes? Then put the splits outside: "
            f"{root / 'train' / full[0]}."
        )
    for one, other in combinations(sorted(name for name, below in inside.items() if len(below) > 1), 2):
        if len(shared := inside[one] & inside[other]) > 1:
            raise DataError(
                f"'{one}' and '{other}' of '{root}' hold folders of the same names ({listed(sorted(shared))}). If "
                f"these are the classes: --train-split {one} --val-split {other}. If {one} and {other} are: list them "
                f"in a file, one per line (--class-map FILE.txt).{FOLDS if len(inside) > 2 else ''}"
            )


def _send_inside(found: Scan, name: str) -> None:
    path = found.folder / name
    if any(place[0] == name and len(place) > 2 for place in found.images):
        raise DataError(f"'{found.folder}' itself has no train/, but '{name}' in it does: --data {path}")
    raise DataError(
        f"'{path}' holds train/, but that has images and no class folders, as for object detection; okdc trains "
        f"classifiers: expected one folder per class, as in {path / 'train' / 'cat' / '1.jpg'}."
    )


def lists_all(root: Path, named: dict[str, int]) -> bool:
    """Whether all that are named are folders of the root: then these are the classes, whatever they hold."""
    return set(named) <= set(map(spelled, folders(root)))
