"""The rows of a table of images: a CSV or TSV file with a header, and in each row a path and a label, maybe a split."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from okdc.data.names import listed, spelled
from okdc.data.paths import are_files
from okdc.data.scan import is_image
from okdc.errors import DataError, nearest
from okdc.recipe import DataSettings

DELIMITERS = ",;\t|"
PATHS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path")
IDS = ("id", "image_id", "img_id", "image_name", "img_name", "name")  # paths, where they are files
LABELS = ("label", "class", "category", "target", "class_name", "label_name")
SPLITS = ("split", "subset", "set")


@dataclass(frozen=True)
class Row:
    """One image: `place` says where it is named, `file` is its path, as it is written, `split` a word or nothing."""

    place: str
    file: str
    label: str
    split: str = ""


def read_table(table: Path, settings: DataSettings) -> list[Row]:
    """What a CSV or TSV file says of each image; DataError for columns that are not found and for empty cells."""
    header, cells = _read(table)
    path = _path_column(table, header, cells, settings.path_column)
    split = _column(["" if name == settings.label_column else name for name in header], SPLITS)
    label = _label_column(table, header, {path, split}, settings.label_column)
    if empty := [line for line, row in cells if not row[path] or not row[label]]:
        raise DataError(
            f"{len(empty)} rows of '{table}' have no {header[path]} or no {header[label]} ({_lines(empty)}); "
            "expected one label for each image. Fill the cells, or delete the rows."
        )
    return [
        Row(
            f"line {line} of {table.name}",
            row[path],
            spelled(row[label]),
            "" if split is None else row[split],
        )
        for line, row in cells
    ]


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
    if (named := _column(header, PATHS)) is not None:
        return named
    others = [i for i, name in enumerate(header) if _column([name], (*LABELS, *SPLITS)) is None]
    full = [i for i in others if are_files(table, [row[i] for _, row in cells[:20]])]
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
