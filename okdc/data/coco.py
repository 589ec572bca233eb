"""Annotations as COCO and iNaturalist write them: a JSON file of images, categories, and which image shows which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from okdc.data.names import listed, spelled
from okdc.data.rows import Row, file_of
from okdc.data.values import log
from okdc.errors import DataError

EXPECTED = (
    "expected images (id, file_name), categories (id, name) and annotations (image_id, category_id), as COCO and "
    "iNaturalist write them"
)


def read_coco(path: Path) -> list[Row]:
    """What the file says of each image; DataError for what is no such file, and for ids that are not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as JSON ({error}); {EXPECTED}.") from error
    try:
        files = _by_id(path, "images", content["images"], "file_name")
        names = _by_id(path, "categories", content["categories"], "name")
        pairs = [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
        lost = [i for i, (image, category) in enumerate(pairs) if image not in files or category not in names]
    except (KeyError, TypeError) as error:
        raise DataError(f"'{path}' is not laid out as needed ({type(error).__name__}: {error}); {EXPECTED}.") from error
    if lost or not pairs:
        raise DataError(
            f"{len(lost)} of the {len(pairs)} annotations of '{path}' name an image or a category that is not in it "
            f"(number {listed(map(str, lost), 3) or 'none'}, from 0); {EXPECTED}."
        )
    shown = {image for image, _ in pairs}
    if bare := [file for image, file in files.items() if image not in shown]:
        log.warning("images of '%s' without an annotation are left out: %s", path, listed(bare))
    return [
        Row(f"annotation {i} of {path.name}", file_of(path, files[image]), spelled(names[category]))
        for i, (image, category) in enumerate(pairs)
    ]


def _by_id(path: Path, kind: str, entries: Any, key: str) -> dict[Any, str]:
    """What each id stands for; DataError where two have one id or one name."""
    found = {entry["id"]: str(entry[key]).strip() for entry in entries}
    if len(found) < len(entries) or len(set(found.values())) < len(found) or "" in found.values():
        raise DataError(f"the {kind} of '{path}' have an id or a {key} twice, or an empty one; expected one for each.")
    return found
