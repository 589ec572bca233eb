"""What okdc says when it cannot go on: what was given, what was expected, what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OkdcError(Exception):
    """A mistake that the user can mend; the command line prints it as one paragraph and exits with `exit_code`."""

    exit_code = 2


class RecipeError(OkdcError):
    """A recipe, flag or method setting that does not exist or has the wrong type."""


class NetworkError(OkdcError):
    """A network that cannot be found, built or inspected."""


class CutError(OkdcError):
    """A network that cannot be shared at the place asked for."""


class MethodError(OkdcError):
    """A class of a method that cannot be trained as it is written."""


class DataError(OkdcError):
    """Images or labels that cannot be trained on."""


class RunError(OkdcError):
    """A run folder or checkpoint that cannot be used as asked."""


class ExportError(OkdcError):
    """An export target that is not available, or that could not be written."""


class TrainingError(OkdcError):
    """Training that cannot go on, such as a loss that stays non-finite; the last good state is kept."""

    exit_code = 1


class GateError(OkdcError):
    """An exported file that runs, but not well enough to ship."""

    exit_code = 3


def refuse_address(given: object, what: str) -> None:
    """OkdcError for https://… where a place on this machine is expected, before Path makes https:/… of it."""
    if "://" in str(given):
        raise OkdcError(
            f"{what} {given} is an address, and a file or folder of this machine is expected: download it, and give "
            "its path."
        )


def first_line(error: BaseException) -> str:
    """The first line that an error has, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def counted(count: int, noun: str) -> str:
    """A number of things: 1 image, 2 images, 1,234 images."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def nearest(name: str, known: Iterable[str], count: int = 3, alike: float = 0.5) -> str:
    """The known names most like `name` (`alike`, 0 to 1), as the end of an error: ` Did you mean a, b?`, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=count, cutoff=alike)
    return f" Did you mean {', '.join(matches)}?" if matches else ""
