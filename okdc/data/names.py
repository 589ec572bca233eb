"""Names of folders and files, as people write them: their order, and the same name in two spellings."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from okdc.errors import DataError


def spelled(name: str) -> str:
    """The name in Unicode's composed form (NFC): some systems store the é of café as e and an accent."""
    return unicodedata.normalize("NFC", name)


def natural_key(name: str) -> Any:
    """Sorts 9 before 10 and a beside A, as timm does; of names that differ in case or zeros only, by their letters.

    No two names have one key, so that an order does not depend on the process, the system or the file system.
    """
    composed = spelled(name)
    pieces = re.split(r"(\d+)", composed.lower())  # every second one is a number
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], composed, name


def by_index(names: Iterable[str]) -> dict[str, int]:
    """Class name -> index, in natural order."""
    return {name: index for index, name in enumerate(sorted(set(names), key=natural_key))}


def check_lines(names: Iterable[str], whose: str) -> None:
    """DataError for names of classes that cannot be a line of labels.txt each; `whose` classes they are."""
    if broken := [name for name in names if not is_line(name)]:
        raise DataError(
            f"the class {broken[0]!r} of {whose} has a name that is no line of text, and it is to be one of "
            "labels.txt: rename it."
        )


def is_line(name: str) -> bool:
    """Whether a name can be a line of a UTF-8 file: not empty, without line breaks, of letters that can be coded."""
    return bool(name) and not any(letter in "\n\r" or "\ud800" <= letter <= "\udfff" for letter in name)


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names as part of a sentence: `a, b, c and 12 more`."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
