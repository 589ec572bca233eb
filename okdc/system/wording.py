"""Words that may leave this machine: without the names of its folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from okdc.errors import first_line


def one_line(error: BaseException) -> str:
    """An error as one line without local paths or colours: what a bundle may carry."""
    return without_paths(_plain(first_line(error)))


def all_lines(error: BaseException) -> str:
    """All that an error says, likewise."""
    return without_paths(_plain(str(error).strip())) or one_line(error)


def _plain(text: str) -> str:
    """The text without the codes that colour a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def without_paths(text: str) -> str:
    """The text with every absolute path cut down to its last part."""
    text = re.sub(r"(?<![\w/.])~?/(?!/)[^\s'\",;:)\]]+", lambda match: match[0].rstrip("/").rsplit("/", 1)[-1], text)
    return re.sub(r"\b[A-Za-z]:\\[^\s'\",;)\]]+", lambda match: match[0].rstrip("\\").rsplit("\\", 1)[-1], text)


def portable(value: Any) -> Any:
    """A json value whose strings name no place on this machine."""
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {str(key): portable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(entry) for entry in value]
    return value
