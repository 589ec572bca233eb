"""Labels in a table: a CSV or TSV file with a header, and in each row a path and a label, perhaps a split too."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from okdc.data.folders import read_class_map
from okdc.data.images import Images, names_by_index, split_in_two
from okdc.data.names import by_index, listed, natural_key, spelled
from okdc.data.scan import Files, is_image
from okdc.data.splits import ROLES, role
from okdc.data.values import Source, log
from okdc.errors import DataError, nearest
from okdc.recipe import DataSettings

ENDINGS = (".csv", ".tsv")
DELIMITERS = ",;\t|"
PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path")
LABELS = ("label", "class", "category", "target", "class_name", "label_name")
SPLITS = ("split", "subset", "set")


@dataclass(frozen=True)
class Row:
    """One image: `line` is where the table names it, `file` its whole path."""

    table: str
    line: int
    file: str
    label: str
    split: str


def is_table(given: str) -> bool:
    """Whether what `--data` names is such a file, by how its name ends."""
    return given.lower().endswith(ENDINGS) and Path(given).expanduser().is_file()


def open_table(settings: DataSettings) -> Source:
    """The images that the table `settings.data` names; raises DataError for rows that could not be trained on.

    `settings.val_split` may be a second table: its path, or its name beside the first.
    """
    table = Path(settings.data).expanduser()
    second = _second(table, settings.val_split) if settings.val_split.lower().endswith(ENDINGS) else None
    default, rows, validation = DataSettings(), _rows(table, settings), None
    asked = replace(settings, val_split=default.val_split) if second else settings  # of the table's own splits
    if any(row.split for row in rows):
        rows, validation = _by_split(table, rows, asked)
    elif (asked.train_split, asked.val_split) != (default.train_split, default.val_split):
        raise DataError(
            f"'{table}' has no column of splits ({', '.join(SPLITS)}) in which --train-split and --val-split could "
            "look; expected one, or a second table: --val-split FILE.csv"
        )
    if second:
        if validation:
            log.warning("of '%s', not used: %d rows to validate with; '%s' does", table, len(validation), second)
        validation = _rows(second, settings)
    return _source(table, rows, validation, settings)


def _second(table: Path, given: str) -> Path:
    for path in (table.parent / given, Path(given).expanduser()):
        if path.is_file():
            return path
    raise DataError(
        f"--val-split {given}: there is no such file, here or in '{table.parent}'; expected a table like '{table}'."
    )


def _source(table: Path, rows: list[Row], validation: list[Row] | None, settings: DataSettings) -> Source:
    every = [*rows, *(validation or [])]
    names = {row.label for row in every}
    _check_labels(table, every)
    classes = read_class_map(settings.class_map, table.parent) if settings.class_map else by_index(names)
    if unnamed := [name for name in by_index(names) if name not in classes]:
        if len(unnamed) == len(names):
            raise DataError(
                f"the class map and '{table}' have no class in common: the map names {listed(classes)}, the table "
                f"{listed(unnamed)}. Expected the labels of the table, one per line: --class-map FILE.txt"
            )
        log.warning("the class map leaves out images of '%s': %s", table, listed(unnamed))
    train = _images(table, rows, classes)
    if validation is None:
        return split_in_two(train, names_by_index(classes), table.name)
    if shared := {row.file for row in rows} & {row.file for row in validation}:
        log.warning(
            "%d images of '%s' train and validate (%s): how good the student is on new images is not measured",
            len(shared), table, listed(sorted(shared), 3),
        )  # fmt: skip
    if unseen := by_index({row.label for row in rows} - {row.label for row in validation}):
        log.warning("no validation image of class %s", listed(unseen))
    return Source(train, _images(table, validation, classes), names_by_index(classes), table.name)


def _images(table: Path, rows: list[Row], classes: dict[str, int]) -> Images:
    """In natural order of their paths, as images in folders are: the rows may be sorted anew before a run goes on."""
    labels = {row.file: classes[row.label] for row in rows if row.label in classes}
    if again := sum(row.label in classes for row in rows) - len(labels):
        log.warning("rows of '%s' that repeat an image are left out: %d", table, again)
    paths = sorted(labels, key=natural_key)
    files = Files(table.parent, paths, [labels[path] for path in paths])
    return Images(files, files.labels, str(table))


def _rows(table: Path, settings: DataSettings) -> list[Row]:
    """What the table says of each image; DataError for cells that are empty, and for files that are not there."""
    header, cells = _read(table)
    path = _path_column(table, header, cells, settings.path_column)
    split = _column(header, SPLITS)
    label = _label_column(table, header, {path, split}, settings.label_column)
    if empty := [line for line, row in cells if not row[path] or not row[label]]:
        raise DataError(
            f"{len(empty)} rows of '{table}' have no {header[path]} or no {header[label]} ({_lines(empty)}); "
            f"expected one label for each image. Fill the cells, or delete the rows."
        )
    rows = [
        Row(table.name, line, _file(table, row[path]), spelled(row[label]), "" if split is None else row[split])
        for line, row in cells
    ]
    if missing := [row for row in rows if not os.path.isfile(row.file)]:
        raise DataError(
            f"{len(missing)} of the {len(rows)} files in column '{header[path]}' of '{table}' do not exist, for "
            f"example {listed((row.file for row in missing), 3)} ({_lines([row.line for row in missing])}); expected "
            f"paths from the folder of the table, '{table.parent}'. Mend them, or say which column has the paths: "
            "--path-column NAME"
        )
    return rows


def _file(table: Path, path: str) -> str:
    return os.path.normpath(os.path.join(table.parent, path))


def _read(table: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and the rows, each with its line; DataError for what is no table."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = "\t" if table.suffix.lower() == ".tsv" else max(DELIMITERS, key=first.count)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except UnicodeDecodeError as error:
        raise DataError(f"'{table}' is not UTF-8 ({error}): save it as CSV UTF-8.") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"the table '{table}' cannot be read ({error}): see to its quotes and permissions.") from error
    if len(lines) < 2:
        raise DataError(f"'{table}' has no rows; expected a header such as path,label and a row for each image.")
    (_, header), *rows = lines
    if len(header) < 2 or any(is_image(name) for name in header):
        raise DataError(
            f"the first line of '{table}' is {listed(header)}; expected the names of two columns or more, such as "
            "path,label. Write them above the first image."
        )
    if uneven := [line for line, row in rows if len(row) != len(header)]:
        raise DataError(
            f"{len(uneven)} rows of '{table}' do not have the {len(header)} cells of its header ({listed(header)}), "
            f"see {_lines(uneven)}. Put quotes around what holds a '{delimiter}'."
        )
    return header, rows


def _lines(numbers: Sequence[int]) -> str:
    return f"line{'s' * (len(numbers) > 1)} {listed(map(str, numbers), 3)}"


def _column(header: list[str], names: Iterable[str]) -> int | None:
    """The column of the first of the names that there is, however it is written."""
    there = [name.lower().replace(" ", "_").replace("-", "_") for name in header]
    return next((there.index(name) for name in names if name in there), None)


def _given(table: Path, header: list[str], name: str, flag: str) -> int:
    if header.count(name) != 1:
        raise DataError(
            f"{flag} {name}: '{table}' has {header.count(name) or 'no'} such columns; it has {listed(header, 20)}."
            f"{nearest(name, header)}"
        )
    return header.index(name)


def _path_column(table: Path, header: list[str], cells: list[tuple[int, list[str]]], given: str | None) -> int:
    """The one that is given, or is named so, or whose first cells are files."""
    if given:
        return _given(table, header, given, "--path-column")
    some = [row for _, row in cells[:20]]
    full = [i for i in range(len(header)) if all(os.path.isfile(_file(table, row[i])) for row in some)]
    named = _column(header, PATHS)
    if named is None and len(full) != 1:
        raise DataError(
            f"which column of '{table}' has the paths? Expected one called {', '.join(PATHS[:3])} or {PATHS[6]}; it "
            f"has {listed(header, 20)}, of which {listed(header[i] for i in full) or 'none'} holds paths of files from "
            f"'{table.parent}'. Say which: --path-column NAME"
        )
    return full[0] if named is None else named


def _label_column(table: Path, header: list[str], taken: set[int | None], given: str | None) -> int:
    """The one that is given, or is named so, or the only one that is left."""
    if given:
        return _given(table, header, given, "--label-column")
    left = [i for i in range(len(header)) if i not in taken]
    named = _column([name if i in left else "" for i, name in enumerate(header)], LABELS)
    if named is None and len(left) != 1:
        raise DataError(
            f"which column of '{table}' has the labels? Expected one called {', '.join(LABELS[:3])} or {LABELS[3]}; it "
            f"has {listed(header, 20)}. Say which: --label-column NAME"
        )
    return left[0] if named is None else named


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


def _check_labels(table: Path, rows: list[Row]) -> None:
    """Raise DataError for labels that cannot be learned: one for all images, two for one image."""
    names = {row.label for row in rows}
    if len(names) == 1:
        raise DataError(f"'{table}' has only one class ({rows[0].label}); expected at least two.")
    if lines := [row.line for row in rows if row.label.splitlines() != [row.label]]:
        raise DataError(f"labels of '{table}' ({_lines(lines)}) go over several lines; expected a name each.")
    first: dict[str, Row] = {}
    torn = [(there, row) for row in rows if (there := first.setdefault(row.file, row)).label != row.label]
    if torn:
        there, row = torn[0]
        raise DataError(
            f"'{table}' gives {len({row.file for _, row in torn})} images two labels, for example {row.file}: "
            f"{there.label} in line {there.line} of {there.table}, {row.label} in line {row.line} of {row.table}. okdc "
            "trains classifiers with one label per image: delete the wrong rows."
        )
