"""Key points as COCO writes them: a JSON file of images, one category with names of points, and annotations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from okdc.data.names import listed
from okdc.data.poses import NO_PAIRS, Pose, around
from okdc.data.values import log
from okdc.errors import DataError
from okdc.tasks.shared.point_labels import AREA
from okdc.tasks.shared.skeleton import Pairs, Skeleton

EXPECTED = (
    "expected images (id, file_name), a category with the names of its keypoints, and annotations (image_id, keypoints "
    "as x, y, v for each of them), as COCO writes them"
)


def read_coco_keypoints(path: Path) -> tuple[list[Pose], Skeleton]:
    """The instances that have a labelled point, crowds left out; DataError for what is no such file.

    Beyond COCO a category may have `flip_pairs` (from 0, `"none"` where there are none; an empty list says nothing) and
    `sigmas`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        category = _category(path, content["categories"])
        skeleton = _skeleton(path, category)
        folder, files = _files(path, content["images"])
        poses = [
            _pose(path, i, entry, str(folder / files[entry["image_id"]]), len(skeleton.names))
            for i, entry in enumerate(content["annotations"])
            if entry["category_id"] == category["id"] and not entry.get("iscrowd")
        ]
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as JSON ({error}); {EXPECTED}.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{path}' is not laid out as needed ({type(error).__name__}: {error}); {EXPECTED}.") from error
    kept = [pose for pose in poses if pose.labelled]
    if bare := len(poses) - len(kept):
        log.warning("annotations of '%s' without a labelled point are left out: %d", path, bare)
    if len(poses) and not any("bbox" in entry for entry in content["annotations"]):
        log.warning("'%s' has no boxes: those around the labelled points are taken", path)
    return kept, skeleton


def _category(path: Path, categories: list[dict[str, Any]]) -> dict[str, Any]:
    found = [each for each in categories if each.get("keypoints")]
    if len(found) != 1:
        raise DataError(
            f"'{path}' has {len(found) or 'no'} categories with keypoints"
            f"{': ' + listed(str(each.get('name')) for each in found) if found else ''}; expected one. One network "
            "learns the points of one kind of thing: write a file for each."
        )
    return found[0]


def _skeleton(path: Path, category: dict[str, Any]) -> Skeleton:
    names = tuple(str(name) for name in category["keypoints"])
    pairs: Pairs | None = None
    given = category.get("flip_pairs")
    if given == NO_PAIRS:
        pairs = ()
    elif given:
        pairs = tuple((int(i), int(j)) for i, j in given)
    edges = tuple((int(i) - 1, int(j) - 1) for i, j in category.get("skeleton") or ())
    sigmas = tuple(float(sigma) for sigma in category.get("sigmas") or ())
    wrong = [pair for pair in (*edges, *(pairs or ())) if not all(0 <= i < len(names) for i in pair)]
    if wrong or len(sigmas) not in (0, len(names)) or len(set(names)) < len(names):
        raise DataError(
            f"the category {category.get('name')!r} of '{path}' names {len(names)} keypoints, each once; expected a "
            "skeleton of numbers from 1, flip_pairs of numbers from 0 and as many sigmas, got "
            f"{wrong or f'{len(sigmas)} sigmas and {len(set(names))} different names'}."
        )
    return Skeleton(names, edges, pairs, sigmas)


def _files(path: Path, images: list[dict[str, Any]]) -> tuple[Path, dict[Any, str]]:
    """The folder that the images are in, and the file of each id."""
    files = {each["id"]: str(each["file_name"]) for each in images}
    if len(files) < len(images) or not files:
        raise DataError(f"the images of '{path}' have an id twice, or there are none; expected one for each.")
    split = path.stem.rpartition("_")[2]  # person_keypoints_train2017
    above = path.parent.parent
    places = [
        path.parent,
        *(root / sub for root in (path.parent, above) for sub in ("images", split, f"images/{split}")),
    ]
    first = next(iter(files.values()))
    folder = next((place for place in (*places, above) if (place / first).is_file()), None)
    if folder is None:
        raise DataError(
            f"the images of '{path}' are not found: the first is {first}, and it is in none of "
            f"{listed((f'{str(place)!r}' for place in places), 4)}. Put them into a folder images beside the file."
        )
    return folder, files


def _pose(path: Path, number: int, entry: dict[str, Any], file: str, keypoints: int) -> Pose:
    flat = [float(value) for value in entry["keypoints"]]
    place = f"annotation {entry.get('id', number)} of {path.name}"
    if len(flat) != 3 * keypoints or not all(map(math.isfinite, flat)):
        raise DataError(f"{place} has {len(flat)} numbers for its keypoints; expected x, y, v of {keypoints}, finite.")
    points = tuple((x, y, float(v > 0)) for x, y, v in zip(flat[::3], flat[1::3], flat[2::3]))
    box = tuple(float(value) for value in entry["bbox"]) if "bbox" in entry else around(points)
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
        raise DataError(f"{place} has the bbox {list(box)}; expected x, y and a width and height above 0.")
    return Pose(place, file, points, box, float(entry.get("area") or AREA * box[2] * box[3]))
