"""Labels in a file beside the images: a table of paths and labels, or annotations in JSON."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from okdc.data.annotations import read_annotations
from okdc.data.cells import ENDINGS
from okdc.data.folders import open_training, read_class_map
from okdc.data.images import Images, count, names_by_index, split_in_two
from okdc.data.names import by_index, is_line, listed, natural_key
from okdc.data.paths import located
from okdc.data.rows import SPLITS, Row, read_table
from okdc.data.scan import Files
from okdc.data.splits import ROLES, role
from okdc.data.values import Source, log
from okdc.errors import DataError, nearest
from okdc.recipe import DataSettings

SEVERAL = re.compile(r"[\s,;|]+")  # between the labels of an image that has several
FRACTION = re.compile(r"-?\d+[.,]\d*[1-9]\d*")
MISSING = ("nan", "na", "n/a", "#n/a", "null", "undefined")  # as programs write an empty cell


def is_table(settings: DataSettings) -> bool:
    """Whether such a file names the images, or those that validate beside class folders, by how its name ends."""
    data = Path(settings.data).expanduser()
    return _names_file(settings) if data.is_dir() else data.name.lower().endswith(ENDINGS) and data.is_file()


def _names_file(settings: DataSettings) -> bool:
    return settings.val_split.lower().endswith(ENDINGS)


def open_table(settings: DataSettings, several: bool = False) -> Source:
    """The images that the file `settings.data` names, with one label each, or with `several` or none.

    Raises DataError for rows that could not be trained on.

    `settings.val_split` may be a second file: its path, or its name beside the first, or in the folder of the images
    that are trained on.
    """
    table = Path(settings.data).expanduser()
    if table.is_dir():
        return _beside_folders(table, settings)
    second = _second(table.parent, settings.val_split) if _names_file(settings) else None
    default, rows, validation = DataSettings(), _read(table, settings, several=several), None
    asked = replace(settings, val_split=default.val_split) if second else settings  # of the table's own splits
    if any(row.split for row in rows):
        rows, validation = _by_split(table, rows, asked)
    elif (asked.train_split, asked.val_split) != (default.train_split, default.val_split):
        raise DataError(
            f"'{table}' has no splits (a table has a column called {', '.join(SPLITS)}) from which --train-split and "
            f"--val-split could choose; expected a second file to validate with: --val-split FILE{table.suffix}"
        )
    if second:
        if validation:
            log.warning("of '%s', not used: %d rows to validate with; '%s' does", table, len(validation), second)
        validation = _read(second, settings, several=several)
    return _source(table, rows, validation, settings, several)


def _read(table: Path, settings: DataSettings, root: Path | None = None, several: bool = False) -> list[Row]:
    json = table.suffix.lower() == ".json"
    rows = read_annotations(table, several) if json else read_table(table, settings, several)
    names, places, splits = zip(*((row.file, row.place, row.split) for row in rows), strict=True)
    files = located(table, names, places, splits, root)
    return [replace(row, file=file) for row, file in zip(rows, files, strict=True)]


def _second(folder: Path, given: str) -> Path:
    for path in (folder / given, Path(given).expanduser()):
        if path.is_file():
            return path
    raise DataError(
        f"--val-split {given}: there is no such file, here or in '{folder}'; expected the labels of the images to "
        f"validate with: a table, or COCO's JSON ({', '.join(ENDINGS)})."
    )


def _beside_folders(root: Path, settings: DataSettings) -> Source:
    """Training images in class folders, and a file that names those to validate with."""
    table = _second(root, settings.val_split)
    train, classes, _ = open_training(replace(settings, val_split=DataSettings().val_split))
    rows = _read(table, settings, root)
    _check_labels(table, rows)
    if foreign := by_index({row.label for row in rows} - classes.keys()):
        raise DataError(
            f"labels of '{table}' are no classes of '{train.origin}': {listed(foreign)}; expected the names of its "
            f"class folders, such as {listed(classes)}."
        )
    return _paired(train, rows, table, classes, root.resolve().name)


def _source(
    table: Path, rows: list[Row], validation: list[Row] | None, settings: DataSettings, several: bool
) -> Source:
    every = [*rows, *(validation or [])]
    names = {row.label for row in every} - ({""} if several else set())
    _check_labels(table, every, several)
    classes = read_class_map(settings.class_map, table.parent) if settings.class_map else by_index(names)
    if unnamed := [name for name in by_index(names) if name not in classes]:
        if len(unnamed) == len(names):
            raise DataError(
                f"the class map and '{table}' have no class in common: the map names {listed(classes)}, the table "
                f"{listed(unnamed)}. Expected the labels of the table, one per line: --class-map FILE.txt"
            )
        log.warning("the class map leaves out images of '%s': %s", table, listed(unnamed))
    train = _images(table, rows, classes, several)
    if validation is None:
        return split_in_two(train, names_by_index(classes), table.name)
    return _paired(train, validation, table, classes, table.name, several)


def _paired(
    train: Images, validation: list[Row], table: Path, classes: dict[str, int], name: str, several: bool = False
) -> Source:
    """The source, once it is said what the images to validate with leave open."""
    learned = {os.path.normpath(train.name(i)) for i in range(len(train))}
    if shared := sorted(row.file for row in validation if row.file in learned):
        log.warning(
            "%d images of '%s' train and validate (%s): how good the student is on new images is not measured",
            len(shared), table, listed(shared, 3),
        )  # fmt: skip
    names, seen = names_by_index(classes), {row.label for row in validation}
    if unseen := [name for name, images in zip(names, count(train.labels, len(names))) if images and name not in seen]:
        log.warning("no validation image of class %s", listed(unseen))
    return Source(train, _images(table, validation, classes, several), names, name)


def _images(table: Path, rows: list[Row], classes: dict[str, int], several: bool = False) -> Images:
    """In natural order of their paths, as images in folders are: the rows may be sorted anew before a run goes on."""
    if several:
        return _several(table, rows, classes)
    labels = {row.file: classes[row.label] for row in rows if row.label in classes}
    if again := sum(row.label in classes for row in rows) - len(labels):
        log.warning("rows of '%s' that repeat an image are left out: %d", table, again)
    paths = sorted(labels, key=natural_key)
    files = Files(table.parent, paths, [labels[path] for path in paths])
    return Images(files, files.labels, str(table))


def _several(table: Path, rows: list[Row], classes: dict[str, int]) -> Images:
    """The same of images with as many labels as they have rows with one."""
    there: dict[str, list[float]] = {}
    for row in rows:
        labels = there.setdefault(row.file, [0.0] * (max(classes.values()) + 1))
        if row.label in classes:
            labels[classes[row.label]] = 1.0
    paths = sorted(there, key=natural_key)
    labelled = torch.tensor([there[path] for path in paths])
    return Images(Files(table.parent, paths, [0] * len(paths)), labelled, str(table))


def _by_split(table: Path, rows: list[Row], settings: DataSettings) -> tuple[list[Row], list[Row] | None]:
    """The rows that train and those that validate, which is None where there are none."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(row.split or "(empty)", []).append(row)
    train, validation = _split_words(table, list(parts), settings)
    if not train:
        raise DataError(
            f"no row of '{table}' is for training: its splits are {listed(parts)}. Say which: --train-split NAME"
        )
    if unused := [word for word in parts if word not in train + validation]:
        log.warning("splits of '%s' that are not used: %s", table, listed(unused))
    return [row for word in train for row in parts[word]], [row for word in validation for row in parts[word]] or None


def _split_words(table: Path, words: list[str], settings: DataSettings) -> tuple[list[str], list[str]]:
    """Which of the words in the column of splits are for training, and which for validation (or test, if need be).

    DataError where one is not there that is named, or means nothing that is known.
    """
    default = DataSettings()
    train = settings.train_split if settings.train_split != default.train_split else None
    validation = settings.val_split if settings.val_split != default.val_split else None
    for flag, word in (("--train-split", train), ("--val-split", validation)):
        if word and word not in words:
            raise DataError(f"{flag} {word}: '{table}' has no such split, but {listed(words)}.{nearest(word, words)}")
    left = [word for word in words if word not in (train, validation)]
    unknown = [word for word in left if not role(word)]
    if unknown and not (train and validation):
        raise DataError(
            f"the splits of '{table}' are {listed(words)}, and what {listed(unknown)} is for is not known; expected "
            f"{ROLES['training'][0]}, {ROLES['validation'][1]} or {ROLES['test'][0]}. Mend the cells, or say which are "
            "used: --train-split NAME --val-split NAME"
        )
    of_role = {name: [word for word in left if role(word) == name] for name in ROLES}
    return (
        [train] if train else of_role["training"],
        [validation] if validation else of_role["validation"] or of_role["test"],
    )


def _check_labels(table: Path, rows: list[Row], several: bool = False) -> None:
    """Raise DataError for labels that cannot be learned: one for all images, two for one image."""
    names = {row.label for row in rows} - ({""} if several else set())
    if len(names) < 2:
        raise DataError(f"'{table}' has only one class ({', '.join(names) or 'none'}); expected at least two.")
    if places := [row.place for row in rows if not is_line(row.label) and (row.label or not several)]:
        raise DataError(f"labels of '{table}' go over several lines ({listed(places, 3)}); expected a name each.")
    _warn_of_doubtful(table, names)
    if several:
        return
    first: dict[str, Row] = {}
    torn = [(there, row) for row in rows if (there := first.setdefault(row.file, row)).label != row.label]
    if torn:
        there, row = torn[0]
        raise DataError(
            f"'{table}' gives {len({row.file for _, row in torn})} images two labels, for example {row.file}: "
            f"{there.label} ({there.place}), {row.label} ({row.place}). expected one label per image: "
            "delete the wrong rows, or train with --task multilabel, where images may have several."
        )


def _warn_of_doubtful(table: Path, names: set[str]) -> None:
    """Say which classes may be one that is written in several ways, or none: what spreadsheets hide."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names, key=natural_key):
        alike.setdefault(_bare(name), []).append(name)
    if several := [" and ".join(same) for same in alike.values() if len(same) > 1]:
        log.warning("labels of '%s' that are nearly the same are classes of their own: %s", table, listed(several))
    if several := [
        name for name in by_index(names) if len(parts := SEVERAL.split(name)) > 1 and names.issuperset(parts)
    ]:
        log.warning("labels of '%s' that look like several are classes of their own: %s", table, listed(several))
    if measured := [name for name in by_index(names) if FRACTION.fullmatch(name)]:
        log.warning("labels of '%s' that look like measurements are a class each: %s", table, listed(measured))
    if absent := [name for name in by_index(names) if name.casefold() in MISSING]:
        log.warning("a label of '%s' that looks like a missing one is a class: %s", table, listed(absent))


def _bare(name: str) -> str:
    try:
        return f"{float(name):g}"
    except ValueError:
        return re.sub(r"[\s_-]+", " ", name).casefold()
