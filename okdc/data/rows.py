"""The rows of a table of images: a path, a label, maybe a split; which columns these are is found or said."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from okdc.data.cells import SEPARATORS, Cells, lines, read_cells
from okdc.data.names import listed, spelled
from okdc.data.paths import are_files
from okdc.data.values import log
from okdc.errors import DataError, nearest
from okdc.recipe import DataSettings

PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path")
IDS = ("id", "image_id", "imageid", "img_id", "image_name", "img_name", "name")  # paths, where they are files
LABELS = ("label", "class", "category", "target", "class_name", "label_name")
SPLITS = ("split", "subset", "set")
FLAGS = {  # of which split are rows where it is not so, and where it is
    "is_valid": ("train", "validation"), "is_val": ("train", "validation"), "is_validation": ("train", "validation"),
    "is_test": ("train", "test"), "is_train": ("validation", "train"), "is_training": ("validation", "train"),
}  # fmt: skip
NO_OR_YES = {"0": 0, "0.0": 0, "false": 0, "no": 0, "": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1}


@dataclass(frozen=True)
class Row:
    """One image: `place` says where it is named, `file` is its path, as it is written, `split` a word or nothing."""

    place: str
    file: str
    label: str
    split: str = ""


def read_table(table: Path, settings: DataSettings, several: bool = False) -> list[Row]:
    """What a table says of each image; DataError for columns that are not found and for empty cells.

    Where an image may have `several` labels it has a row for each, or one without a label.
    """
    cells = read_cells(table, several)
    path = _path_column(table, cells, settings.path_column)
    open_names = ["" if i == path or name == settings.label_column else name for i, name in enumerate(cells.header)]
    split = _column(open_names, (*SPLITS, *FLAGS))
    splits = [""] * len(cells.rows) if split is None else _splits(table, cells, split)
    labels, used = _labels(table, cells, {path, split}, settings.label_column, several)
    files = cells.column(path)
    if empty := [
        line
        for (line, _), file, label in zip(cells.rows, files, labels, strict=True)
        if not file or not (several or all(label))
    ]:
        raise DataError(
            f"{len(empty)} rows of '{table}' have no {cells.header[path]} or no {_names(cells, used)} "
            f"({lines(empty)}); expected one label for each image. Fill the cells, or delete the rows."
        )
    if unused := [name or "(no name)" for i, name in enumerate(cells.header) if i not in {path, split, *used}]:
        log.warning("columns of '%s' that are not used: %s", table, listed(unused))
    places = (f"line {line} of {table.name}" for line, _ in cells.rows)
    found = zip(places, files, labels, splits, strict=True)
    return [Row(place, file, spelled(name), word) for place, file, names, word in found for name in names or [""]]


def _names(cells: Cells, columns: Iterable[int]) -> str:
    return listed(cells.header[i] for i in sorted(columns))


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


def _path_column(table: Path, cells: Cells, given: str | None) -> int:
    """The one that is given, or is named so, or whose first cells are files."""
    header = cells.header
    if given:
        return _given(table, header, given, "--path-column")
    if (named := _column(header, PATHS)) is not None:
        return named
    others = [i for i, name in enumerate(header) if _column([name], (*LABELS, *SPLITS)) is None]
    some = {i: cells.column(i)[:20] for i in others}
    # A column of 0 and 1 is none of paths, though there may be a 0.png and a 1.png.
    full = [i for i in others if 2 * len(set(some[i])) > len(some[i]) and are_files(table, some[i])]
    if len(full) != 1:
        ids = _column([name if i in (full or others) else "" for i, name in enumerate(header)], IDS)
        if ids is not None:
            return ids
        raise DataError(
            f"which column of '{table}' has the paths? Expected one called {', '.join(PATHS[:3])} or {PATHS[6]}; it "
            f"has {listed(header, 20)}, of which {listed(header[i] for i in full) or 'none'} holds paths of files from "
            f"'{table.parent}'. Say which: --path-column NAME"
        )
    return full[0]


def _splits(table: Path, cells: Cells, column: int) -> list[str]:
    words = cells.column(column)
    flag = cells.header[column].lower().replace(" ", "_").replace("-", "_")
    if flag not in FLAGS:
        return words
    if wrong := sorted({word for word in words if word.lower() not in NO_OR_YES}):
        raise DataError(
            f"the column {cells.header[column]} of '{table}' holds {listed(wrong)}; expected True or False."
        )
    return [FLAGS[flag][NO_OR_YES[word.lower()]] for word in words]


def _labels(
    table: Path, cells: Cells, taken: set[int | None], given: str | None, several: bool
) -> tuple[list[list[str]], list[int]]:
    """The labels of each row, and the columns that say it: the one given, named so or left alone, or one per class."""
    left = [i for i in range(len(cells.header)) if i not in taken]
    named = _column([name if i in left else "" for i, name in enumerate(cells.header)], LABELS)
    if given:
        named = _given(table, cells.header, given, "--label-column")
    elif named is None and len(left) == 1:
        (named,) = left
    if named is not None:
        column = cells.column(named)
        return _split(table, column) if several else [[label] for label in column], [named]
    marks = [i for i in left if cells.header[i] and {*cells.column(i)} <= {"0", "1", "0.0", "1.0"}]
    if len(marks) < 2:
        raise DataError(
            f"which column of '{table}' has the labels? Expected one called {', '.join(LABELS[:3])} or {LABELS[3]}; it "
            f"has {listed(cells.header, 20)}. Say which: --label-column NAME"
        )
    return _marked(table, cells, marks, several), marks


def _split(table: Path, column: list[str]) -> list[list[str]]:
    """The labels between the separators of a column, in cells such as a|b, a;b, a, b, ['a', 'b'], or a b."""
    bare = [cell[1:-1].replace("'", "").replace('"', "") if cell[:1] + cell[-1:] == "[]" else cell for cell in column]
    separator = next((mark for mark in SEPARATORS if any(mark in cell for cell in bare)), None)
    found = [[label.strip() for label in cell.split(separator) if label.strip()] for cell in bare]
    if separator is None and any(len(labels) > 1 for labels in found):
        names = listed(dict.fromkeys(label for labels in found for label in labels))
        log.warning("labels of '%s' are separated by spaces, as no other mark is there: %s", table, names)
    return found


def _marked(table: Path, cells: Cells, columns: list[int], several: bool) -> list[list[str]]:
    marked = [[i for i in columns if float(row[i])] for _, row in cells.rows]
    if several:
        return [[cells.header[i] for i in marks] for marks in marked]
    if wrong := [line for (line, _), marks in zip(cells.rows, marked, strict=True) if len(marks) != 1]:
        raise DataError(
            f"{len(wrong)} rows of '{table}' do not have one 1 among its columns of 0 and 1 "
            f"({_names(cells, columns)}), see {lines(wrong)}; expected one label per image, or --task multilabel where "
            "they may have several. Mend or delete these rows, or say which column has the labels: --label-column NAME"
        )
    log.warning("the labels of '%s' are its columns of 0 and 1: %s", table, _names(cells, columns))
    return [[cells.header[i]] for (i,) in marked]
