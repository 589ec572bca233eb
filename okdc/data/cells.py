"""The cells of a table, as spreadsheets and programs write them: CSV, TSV, or a JSON object in each line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from okdc.data.names import listed
from okdc.data.scan import is_image
from okdc.errors import DataError

TABLES = (".csv", ".tsv", ".jsonl")
ENDINGS = (*TABLES, ".json")
DELIMITERS = ",;\t|"
SEPARATORS = "|;,"  # between the labels of an image, in one cell


@dataclass(frozen=True)
class Cells:
    """`rows` of cells, without the space around them, each with its line."""

    header: list[str]
    rows: list[tuple[int, list[str]]]

    def column(self, i: int) -> list[str]:
        """The cells of a column."""
        return [row[i] for _, row in self.rows]


def lines(numbers: Sequence[int]) -> str:
    """Which ones, in words: `lines 2, 3, 5 and 4 more`."""
    return f"line{'s' * (len(numbers) > 1)} {listed(map(str, numbers), 3)}"


def read_cells(table: Path, lists: bool = False) -> Cells:
    """What a .csv, .tsv or .jsonl file holds; DataError for what is no table. JSON's `lists` become a|b, or nothing."""
    ending = table.suffix.lower()
    try:
        text = _text(table)
        return _of_objects(table, text, lists) if ending == ".jsonl" else _of_lines(table, text, ending == ".tsv")
    except UnicodeDecodeError as error:
        raise DataError(f"'{table}' is not UTF-8 ({error}): save it as CSV UTF-8.") from error
    except csv.Error as error:
        raise DataError(f"the table '{table}' cannot be read ({error}): see to its quotes.") from error


def _text(table: Path) -> str:
    try:
        content = table.read_bytes()
    except OSError as error:
        raise DataError(f"the table '{table}' cannot be read ({error}): see to its permissions.") from error
    # What Excel calls Unicode text is UTF-16, and begins with a byte order mark.
    return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def _of_objects(table: Path, text: str, lists: bool) -> Cells:
    entries: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            entries.append((number, _object(table, number, line)))
    header = list(dict.fromkeys(key for _, entry in entries for key in entry))
    return _checked(
        table, header, [(number, [_cell(entry.get(key), lists) for key in header]) for number, entry in entries]
    )


def _object(table: Path, number: int, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict):
        raise DataError(
            f"line {number} of '{table}' is no JSON object; expected one for each image, such as "
            '{"file_name": "cat/1.jpg", "label": "cat"}.'
        )
    return entry


def _cell(value: Any, lists: bool) -> str:
    if lists and isinstance(value, list):
        return SEPARATORS[0].join(map(str, value))
    # A list or an object is no label: an empty cell is told of where it was to be one.
    return "" if isinstance(value, dict | list | None) else str(value).strip()


def _of_lines(table: Path, text: str, tabs: bool) -> Cells:
    first, _, rest = text.partition("\n")
    delimiter = "\t" if tabs else ""
    if told := re.fullmatch('"?sep=(.)"?;*\\s*', first):  # Excel's way to say it
        delimiter, first = told[1], rest.partition("\n")[0]
    delimiter = delimiter or max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    found = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    found = found[1:] if told else found
    header = found[0][1] if found else []
    # Spreadsheets go on with empty cells, in some rows or in whole columns without a name.
    rows = [(line, row[: len(header)] if not any(row[len(header) :]) else row) for line, row in found[1:]]
    if uneven := [line for line, row in rows if len(row) != len(header)]:
        raise DataError(
            f"{len(uneven)} rows of '{table}' do not have the {len(header)} cells of its header ({listed(header)}), "
            f"see {lines(uneven)}. Put quotes around what holds a '{delimiter}'."
        )
    kept = [i for i, name in enumerate(header) if name or any(row[i] for _, row in rows)]
    return _checked(table, [header[i] for i in kept], [(line, [row[i] for i in kept]) for line, row in rows])


def _checked(table: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> Cells:
    if not rows:
        raise DataError(f"'{table}' has no rows; expected a header such as path,label and a row for each image.")
    if len(header) < 2 or any(map(is_image, header)):
        raise DataError(
            f"the first line of '{table}' is {listed(header)}; expected the names of two columns or more, such as "
            "path,label. Write them above the first image."
        )
    return Cells(header, rows)
