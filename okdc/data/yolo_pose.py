"""Key points as Ultralytics' YOLO-pose has them: a YAML file, folders of images, and a text file for each image."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from okdc.data.names import natural_key
from okdc.data.poses import Pose
from okdc.data.scan import is_image, is_visible
from okdc.data.transforms import upright
from okdc.errors import DataError
from okdc.tasks.shared.point_labels import AREA
from okdc.tasks.shared.skeleton import Skeleton

EXPECTED = "expected kpt_shape: [K, 3], flip_idx, and train and val as folders of images, as Ultralytics writes it"


def read_yolo_pose(path: Path) -> tuple[list[Pose], list[Pose] | None, Skeleton]:
    """Instances to train and to validate with (None where it names no `val`); DataError for what is no such file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        count, numbers = (int(each) for each in content["kpt_shape"])
        if len(content.get("names") or ()) > 1:
            raise DataError(
                f"'{path}' has {len(content['names'])} classes; expected one. One network learns the points of one "
                "kind of thing: write a file for each."
            )
        skeleton = _skeleton(path, content, count)
        root = path.parent / str(content.get("path") or "")
        train = _split(root if root.is_dir() else path.parent, content["train"], count, numbers)
        validation = content.get("val")
        kept = _split(root if root.is_dir() else path.parent, validation, count, numbers) if validation else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"'{path}' cannot be read ({error}); {EXPECTED}.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{path}' is not laid out as needed ({type(error).__name__}: {error}); {EXPECTED}.") from error
    return train, kept, skeleton


def _skeleton(path: Path, content: dict[str, Any], count: int) -> Skeleton:
    named = content.get("kpt_names")
    given = next(iter(named.values())) if isinstance(named, dict) and named else named
    names = tuple(str(name) for name in given or (f"point{i}" for i in range(count)))
    order = content.get("flip_idx")
    if len(names) != count or (order and (len(order) != count or any(order[order[i]] != i for i in order))):
        raise DataError(
            f"'{path}' has {count} points by kpt_shape, {len(names)} names and flip_idx {order}; expected as many of "
            "each, and of two points that change places each in the other's place."
        )
    pairs = None if not order else tuple((i, j) for i, j in enumerate(order) if i < j)
    return Skeleton(names, pairs=pairs)


def _split(root: Path, given: str | list[str], count: int, numbers: int) -> list[Pose]:
    found = []
    for folder in [root / each for each in ([given] if isinstance(given, str) else given)]:
        if not folder.is_dir():
            raise DataError(f"'{folder}' is no folder of images; {EXPECTED}.")
        for name in sorted(filter(is_visible, os.listdir(folder)), key=natural_key):
            if is_image(name):
                found += _poses(folder / name, count, numbers)
    return found


def _poses(image: Path, count: int, numbers: int) -> list[Pose]:
    """What is labelled in an image; nothing where it has no file of labels, as Ultralytics means it."""
    head, _, tail = str(image).rpartition(f"{os.sep}images{os.sep}")
    labels = Path(head, "labels", tail).with_suffix(".txt") if head else image.with_suffix(".txt")
    if not labels.is_file():
        return []
    with Image.open(image) as opened:
        width, height = upright(opened).size  # shares are of the image as it is seen
    lines = [line.split() for line in labels.read_text().splitlines() if line.strip()]
    return [
        pose
        for number, cells in enumerate(lines, 1)
        if (pose := _pose(f"line {number} of {labels}", str(image), cells, count, numbers, width, height)).labelled
    ]


def _pose(place: str, file: str, cells: list[str], count: int, numbers: int, width: int, height: int) -> Pose:
    values = [float(cell) for cell in cells[1:]]
    if len(values) != 4 + count * numbers or not all(map(math.isfinite, values)) or min(values[2:4]) <= 0:
        raise DataError(
            f"{place} has {len(cells)} numbers; expected {5 + count * numbers}: the class, a box, and {numbers} for "
            f"each of {count} points, all but the class and the visibility as shares of the image."
        )
    x, y, w, h = (value * side for value, side in zip(values[:4], (width, height, width, height)))
    points = []
    for i in range(4, len(values), numbers):
        across, down, *seen = values[i : i + numbers]
        labelled = seen[0] > 0 if seen else (across, down) != (0, 0)
        points.append((across * width, down * height, float(labelled)))
    return Pose(place, file, tuple(points), (x - w / 2, y - h / 2, w, h), AREA * w * h)
