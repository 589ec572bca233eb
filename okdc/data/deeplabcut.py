"""Key points as DeepLabCut's labelling tool writes them: CollectedData_SCORER.csv, in its four forms.

One animal (rows scorer, bodyparts, coords above the data) or several (with a row individuals), and the image named in
one column or, since version 2.3, in three. Every row is an image; an empty cell is a point without a label.
"""

from __future__ import annotations

import csv
from pathlib import Path

from okdc.data.names import listed
from okdc.data.poses import Pose, around
from okdc.data.values import log
from okdc.errors import DataError
from okdc.tasks.shared.point_labels import AREA
from okdc.tasks.shared.skeleton import Skeleton

PATTERN = "CollectedData*.csv"
HEADERS = (["scorer", "bodyparts", "coords"], ["scorer", "individuals", "bodyparts", "coords"])
EXPECTED = "expected DeepLabCut's rows scorer, bodyparts and coords (with individuals before bodyparts if several)"

Columns = dict[str, dict[str, tuple[int, int]]]  # individual -> body part -> the columns of its x and y


def read_deeplabcut(path: Path) -> tuple[list[Pose], Skeleton]:
    """The animals that have a labelled point, with the box around them; DataError for what is no such file."""
    rows = _rows(path)
    header = [row for row in rows[:4] if row[0].lower() in HEADERS[1]]
    titles = [row[0].lower() for row in header]
    if titles not in HEADERS:
        raise DataError(f"'{path}' begins with the rows {listed(titles) or rows[0][0]!r}; {EXPECTED}.")
    lead = next((i for i, cell in enumerate(header[-1]) if cell in ("x", "y")), 0)
    if not lead or set(header[-1][lead:]) != {"x", "y"}:
        raise DataError(
            f"the coords of '{path}' are {listed(dict.fromkeys(header[-1][1:]))}; expected x and y of each point. A "
            "file with likelihood has predictions, not labels: name CollectedData_*.csv."
        )
    columns = _columns(header, lead)
    names = _names(path, columns)
    poses, root = [], None
    for line, row in enumerate(rows[len(header) :], len(header) + 1):
        image = "/".join(cell for cell in row[:lead] if cell).replace("\\", "/")
        root = _root(path, image) if root is None else root
        for individual, parts in columns.items():
            place = f"line {line} of {path.name}" + f", {individual}" * (len(columns) > 1)
            points = tuple(_point(place, row, *parts[name]) for name in names)
            box = around(points)
            poses.append(Pose(place, str(root / image), points, box, AREA * box[2] * box[3]))
    kept = [pose for pose in poses if pose.labelled]
    return kept, Skeleton(names)


def _rows(path: Path) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(map(str.strip, row))]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"'{path}' cannot be read ({error}); {EXPECTED}.") from error
    if len(rows) < 4 or any(len(row) != len(rows[0]) for row in rows):
        raise DataError(f"'{path}' has no images, or rows of different lengths; {EXPECTED}, and a row for each image.")
    return rows


def _columns(header: list[list[str]], lead: int) -> Columns:
    individuals = header[1] if len(header) == 4 else ["animal"] * len(header[0])
    found: Columns = {}
    for i in range(lead, len(header[0]) - 1):
        if header[-1][i : i + 2] == ["x", "y"]:
            found.setdefault(individuals[i], {})[header[-2][i]] = i, i + 1
    return found


def _names(path: Path, columns: Columns) -> tuple[str, ...]:
    """The body parts that every individual has; what no individual has, DeepLabCut's `single`, is left out."""
    if len(columns) > 1 and columns.pop("single", {}):
        log.warning("points of '%s' that belong to no animal (single) are left out", path)
    first, *others = (tuple(parts) for parts in columns.values())
    if any(other != first for other in others):
        raise DataError(f"the animals of '{path}' have different body parts; expected {listed(first)} of each.")
    return first


def _point(place: str, row: list[str], x: int, y: int) -> tuple[float, float, float]:
    try:
        return (float(row[x]), float(row[y]), 1.0) if row[x] and row[y] else (0.0, 0.0, 0.0)
    except ValueError as error:
        raise DataError(f"{place} has {row[x]}, {row[y]} for a point; expected two numbers, or empty cells.") from error


def _root(path: Path, image: str) -> Path:
    """The folder that images are named from: the project's, at or above the file's own."""
    for root in (path.parent, *path.absolute().parents):
        if (root / image).is_file():
            return root
    raise DataError(
        f"the images of '{path}' are not found: the first is {image}, from '{path.parent}' or a folder above it. Keep "
        "the file in the project that it was made in, beside the images."
    )
