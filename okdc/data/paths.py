"""Where the images are that a file of labels names: as it says, or without ending, or all in one folder near it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from okdc.data.names import listed, spelled
from okdc.data.scan import entries, folders, is_image
from okdc.data.splits import role
from okdc.data.values import log
from okdc.errors import DataError

# What a folder is called that holds files of labels alone.
LABELS = re.compile("(annotation|annot|anno|label|meta|metadata|split|list|csv|table)s?", re.IGNORECASE)


@dataclass
class Finder:
    """Finds files by the names that people give them; each folder is listed once, where a name is not a file's."""

    listings: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def find(self, folder: Path, name: str) -> list[str]:
        """The whole paths of what may be meant: the file, or images of that name with another case or any ending."""
        # Windows writes backslashes, which other systems allow in names.
        for path in dict.fromkeys((name, name.replace("\\", "/"))):
            whole = os.path.normpath(os.path.join(folder, path))
            if os.path.isfile(whole):
                return [whole]
        parent, last = os.path.split(whole)
        if parent not in self.listings:
            self.listings[parent] = _by_key(parent)
        return [os.path.join(parent, file) for file in self.listings[parent].get(_key(last), [])]


def _by_key(folder: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in entries(Path(folder)) if os.path.isdir(folder) else ():
        if is_image(entry.name) and entry.is_file():
            for key in {_key(entry.name), _key(os.path.splitext(entry.name)[0])}:
                found.setdefault(key, []).append(entry.name)
    return found


def _key(name: str) -> str:
    return spelled(name).casefold()


def located(
    table: Path, names: Sequence[str], places: Sequence[str], splits: Sequence[str], root: Path | None = None
) -> list[str]:
    """The whole paths of the files that `names` are; `places` say where in the table each stands, `splits` its split.

    Names are paths from the folder of the table, or from the one folder in it, or beside it, or in `root`, that has
    them all, or all of a split. DataError for files that are not there, and for names that several fit.
    """
    finder = Finder()
    whole = _folder(finder, table, names, root, table.stem)
    of_split = {} if whole else _by_split(finder, table, names, splits, root)
    bases = [whole] * len(names) if whole else [of_split.get(split) for split in splits]
    if None in bases:
        bases = [_most(finder, table, names, root)] * len(names)
    chosen = [base for base in bases if base]
    found = [finder.find(base, name) for base, name in zip(chosen, names, strict=True)]
    if missing := [i for i, paths in enumerate(found) if not paths]:
        some = (f"{os.path.normpath(os.path.join(chosen[i], names[i]))} ({places[i]})" for i in missing)
        raise DataError(
            f"{len(missing)} of the {len(names)} files that '{table}' names do not exist, for example "
            f"{listed(some, 3)}; expected paths from the folder of that file, '{table.parent}', or all from one in it. "
            f"{_way_out(finder, table, names[missing[0]])}"
        )
    if torn := [i for i, paths in enumerate(found) if len(paths) > 1]:
        raise DataError(
            f"{len(torn)} names in '{table}' fit several files, for example '{names[torn[0]]}' ({places[torn[0]]}): "
            f"{listed(found[torn[0]], 3)}. Write the names with their endings into it."
        )
    return [path for (path,) in found]


def are_files(table: Path, names: Sequence[str]) -> bool:
    """Whether these are names of files, as `located` finds them."""
    finder = Finder()
    return any(_has_all(finder, folder, names) for near in _near(table) for folder in near)


def _near(table: Path, root: Path | None = None) -> Iterator[list[Path]]:
    """Where paths may begin, the likelier first: the folder of the table, those in it, `root` and those in that.

    Last what is beside a folder of labels alone, such as annotations/; beside another one there are other data sets.
    """
    yield [table.parent]
    yield [table.parent / name for name in folders(table.parent)]
    if root and not root.samefile(table.parent):
        yield [root]
        yield [root / name for name in folders(root)]
    above = table.absolute().parent.parent
    if LABELS.fullmatch(table.absolute().parent.name) and os.access(above, os.R_OK):
        yield [above]
        yield [above / name for name in folders(above)]


def _has_all(finder: Finder, folder: Path, names: Sequence[str]) -> bool:
    return os.access(folder, os.R_OK | os.X_OK) and all(finder.find(folder, name) for name in names)


def _folder(finder: Finder, table: Path, names: Sequence[str], root: Path | None, split: str) -> Path | None:
    """The first of the places that has all files, which may be of a `split`; None where none has."""
    for near in _near(table, root):
        full = [folder for folder in near if _has_all(finder, folder, names)]
        if len(full) > 1:
            # Kaggle's train.csv names the images of train/, and those of test/ may be called alike.
            full = [folder for folder in full if role(folder.name) and role(folder.name) == role(split)] or full
        if len(full) > 1:
            raise DataError(
                f"the files that '{table}' names are in several folders alike ({listed(map(str, full), 3)}); expected "
                f"one. Write the folder into the paths: {full[0].name}/{names[0]}"
            )
        if full:
            if full != [table.parent]:
                log.warning("the files that '%s' names are in '%s'", table, full[0])
            return full[0]
    return None


def _by_split(
    finder: Finder, table: Path, names: Sequence[str], splits: Sequence[str], root: Path | None
) -> dict[str, Path | None]:
    """The folder of each split, where there are several."""
    parts = {split: [name for name, of in zip(names, splits, strict=True) if of == split] for split in set(splits)}
    if len(parts) < 2:
        return {}
    return {split: _folder(finder, table, part, root, split) for split, part in sorted(parts.items())}


def _most(finder: Finder, table: Path, names: Sequence[str], root: Path | None) -> Path:
    """The place that has the most of the files."""
    some, every = names[:: max(1, len(names) // 100)], [folder for near in _near(table, root) for folder in near]
    return max(every, key=lambda folder: sum(_has_all(finder, folder, [name]) for name in some))


def _way_out(finder: Finder, table: Path, name: str) -> str:
    parts = name.replace("\\", "/").split("/")
    for i in range(1, len(parts)):
        if finder.find(table.parent, "/".join(parts[i:])):
            return f"Are they of another computer? Cut '{name[: len('/'.join(parts[:i])) + 1]}' off the paths."
    return (
        f"Delete those rows, mend the paths, or move '{table.name}'; if paths are elsewhere in it: --path-column NAME"
    )
