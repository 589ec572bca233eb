"""Labels in a JSON file, as COCO and iNaturalist write them, or as FiftyOne does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from okdc.data.names import listed, spelled
from okdc.data.rows import Row
from okdc.data.values import log
from okdc.errors import DataError

EXPECTED = (
    "expected images (id, file_name), categories (id, name) and annotations (image_id, category_id), as COCO and "
    "iNaturalist write them, or classes and labels (image: index), as FiftyOne does"
)


def read_annotations(path: Path, several: bool = False) -> list[Row]:
    """What the file says of each image; DataError for what is no such file, and for ids that are not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as JSON ({error}); {EXPECTED}.") from error
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content) and content:
        raise DataError(
            f"'{path}' is a list of objects; expected one in each line of a .jsonl file: "
            f"jq -c '.[]' '{path}' > '{path.with_suffix('.jsonl')}'"
        )
    if isinstance(content, dict) and "labels" in content and "annotations" not in content:
        return _fiftyone(path, content)
    if isinstance(content, dict) and content and all(isinstance(label, str) for label in content.values()):
        return _fiftyone(path, {"labels": content})  # file -> label, and nothing else
    return _coco(path, content, several)


def _coco(path: Path, content: Any, several: bool) -> list[Row]:
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
    bare = [file for image, file in files.items() if image not in shown]
    if bare and not several:
        log.warning("images of '%s' without an annotation are left out: %s", path, listed(bare))
    rows = [
        Row(f"annotation {i} of {path.name}", files[image], spelled(names[category]))
        for i, (image, category) in enumerate(pairs)
    ]
    return rows + [Row(f"images of {path.name}", file, "") for file in bare if several]


def _by_id(path: Path, kind: str, entries: Any, key: str) -> dict[Any, str]:
    """What each id stands for; DataError where two have one id or one name."""
    found = {entry["id"]: str(entry[key]).strip() for entry in entries}
    if len(found) < len(entries) or len(set(found.values())) < len(found) or "" in found.values():
        raise DataError(f"the {kind} of '{path}' have an id or a {key} twice, or an empty one; expected one for each.")
    return found


def _fiftyone(path: Path, content: dict[str, Any]) -> list[Row]:
    """`labels` maps images of data/, without their endings, to indices of `classes`, or to names where that is null."""
    labels, classes = content["labels"], content.get("classes")
    if not isinstance(labels, dict) or not isinstance(classes, list | None):
        raise DataError(f"'{path}' is not laid out as needed (labels are no object); {EXPECTED}.")
    # With a confidence or attributes, a label is an object of its own.
    given = {image: label.get("label") if isinstance(label, dict) else label for image, label in labels.items()}
    kind: type = str if classes is None else int
    known = {image: label for image, label in given.items() if label not in (None, "")}
    wrong = [image for image, label in known.items() if type(label) is not kind]
    if classes is not None:
        wrong = wrong or [image for image, label in known.items() if not 0 <= label < len(classes)]
    if wrong or not known:
        raise DataError(
            f"{len(wrong)} of the {len(labels)} labels of '{path}' are no class of it ({listed(wrong, 3) or 'none'}); "
            f"expected {'a name' if classes is None else f'an index of its {len(classes)} classes'} for each image."
        )
    if bare := [image for image in given if image not in known]:
        log.warning("images of '%s' without a label are left out: %s", path, listed(bare))
    return [
        Row(f"label of {image} in {path.name}", image, spelled(str(label if classes is None else classes[label])))
        for image, label in known.items()
    ]
