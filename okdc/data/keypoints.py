"""Images with key points, as a data set or a labelling tool has written them: opened, checked, and split.

COCO's JSON (`coco_keypoints`), DeepLabCut's CollectedData_*.csv (`deeplabcut`), Ultralytics' YOLO-pose (`yolo_pose`),
and figures that okdc draws itself (`figures`). `poses` is one split of them; `affine` makes the network's input of an
image and its box, and takes predictions back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from okdc.data.coco_keypoints import read_coco_keypoints
from okdc.data.deeplabcut import PATTERN, read_deeplabcut
from okdc.data.figures import open_figures
from okdc.data.names import listed, natural_key
from okdc.data.poses import NO_PAIRS, Boxes, Pose, Poses, PoseSource
from okdc.data.splits import role
from okdc.data.values import log
from okdc.data.yolo_pose import read_yolo_pose
from okdc.errors import DataError, nearest
from okdc.recipe import FIGURES
from okdc.tasks.shared.skeleton import Pairs, Skeleton

BLOCKS, EVERY = 10, 5  # of what has no split: consecutive images stay together, two blocks of ten validate

Opened = tuple[list[Pose], list[Pose] | None, Skeleton]  # training, validation (None: there are none), what they label


def open_keypoints(data: str, boxes: Boxes = "given", flip_pairs: str = "", exif: bool = True) -> PoseSource:
    """Open and check the key points that `data` names; raises DataError for what could not be trained on.

    A file (COCO's .json, DeepLabCut's .csv, Ultralytics' .yaml), a folder that has them, or `figures`. `flip_pairs`
    says what the data do not: "left_ear/right_ear, ...", or "none" where a mirror swaps no points.
    """
    if data == FIGURES:
        return open_figures(boxes)
    path = Path(data).expanduser()
    train, validation, skeleton = _reader(path)(path)
    if flip_pairs:
        skeleton = replace(skeleton, pairs=pairs_of(flip_pairs, skeleton.names))
    name = path.resolve().name
    if validation is None:
        train, validation = in_blocks(train, data)
        log.info("%s has no images to validate with: %d train, %d validate", data, len(train), len(validation))
        name = f"{name} (80/20 split, blocks of consecutive images)"
    for split, poses in (("training", train), ("validation", validation)):
        _check(split, poses, boxes, data)
    if shared := sorted({pose.file for pose in train} & {pose.file for pose in validation}):
        log.warning(
            "%d images of '%s' train and validate (%s): how good the student is on new images is not measured",
            len(shared), data, listed(shared, 3),
        )  # fmt: skip
    name = f"{name}, boxes {boxes}"
    return PoseSource(Poses(train, boxes, exif), Poses(validation, boxes, exif), skeleton, boxes, name)


def pairs_of(text: str, names: Sequence[str]) -> Pairs:
    """What `left_ear/right_ear, left_paw/right_paw` or `none` says; DataError for names that there are not.

    >>> pairs_of("left/right", ("nose", "left", "right"))
    ((1, 2),)
    """
    if text.strip() == NO_PAIRS:
        return ()
    pairs = [tuple(name.strip() for name in pair.split("/")) for pair in text.split(",")]
    given = [name for pair in pairs for name in pair]
    unknown = [name for name in given if name not in names]
    if unknown or any(len(pair) != 2 for pair in pairs) or len(set(given)) < len(given):
        hint = f" There is no {listed(unknown)}.{nearest(unknown[0], names)}" if unknown else ""
        raise DataError(
            f"--flip-pairs {text}: expected two names of key points for each pair, each name once, such as "
            f"left_ear/right_ear,left_paw/right_paw, or {NO_PAIRS}; the key points are {listed(names, 20)}.{hint}"
        )
    return tuple((names.index(pair[0]), names.index(pair[1])) for pair in pairs)


def in_blocks(poses: list[Pose], data: str) -> tuple[list[Pose], list[Pose]]:
    """(training, validation) of what has no split: in every folder, in natural order, two blocks of ten validate.

    Frames of a film that stand side by side look alike: drawn one by one they would train and validate at once.
    """
    folders: dict[str, list[str]] = {}
    for file in sorted({pose.file for pose in poses}, key=natural_key):
        folders.setdefault(os.path.dirname(file), []).append(file)
    chosen = set()
    for files in folders.values():
        every = min(EVERY, len(files))
        blocks = [min(BLOCKS, len(files)) * i // len(files) for i in range(len(files))]
        chosen |= {file for file, block in zip(files, blocks) if every > 1 and block % every == every // 2}
    if not chosen:
        raise DataError(
            f"'{data}' has {listed(f'{len(files)} images in {folder}' for folder, files in folders.items())}, too "
            "few to set some aside; expected two or more. Label more images, or give images to validate with."
        )
    return [pose for pose in poses if pose.file not in chosen], [pose for pose in poses if pose.file in chosen]


def _reader(path: Path) -> Callable[[Path], Opened]:
    """What reads this file or folder."""
    by_ending = {".json": _one_json, ".csv": _one_csv, ".yaml": read_yolo_pose, ".yml": read_yolo_pose}
    if path.is_file() and path.suffix.lower() in by_ending:
        return by_ending[path.suffix.lower()]
    if path.is_dir():
        if _annotations(path):
            return _coco_folder
        if _projects(path):
            return _deeplabcut_folder
        if sheets := [each for each in sorted(path.glob("*.y*ml")) if "kpt_shape" in each.read_text(errors="replace")]:
            return lambda _: read_yolo_pose(sheets[0])
    what = "does not exist" if not path.exists() else "has no key points that okdc can read"
    raise DataError(
        f"--data '{path}' {what}; expected figures, COCO's key points (train.json and val.json, or one .json, beside "
        "the images), DeepLabCut's CollectedData_SCORER.csv (or the project's folder), or Ultralytics' .yaml with "
        "kpt_shape."
    )


def _one_json(path: Path) -> Opened:
    poses, skeleton = read_coco_keypoints(path)
    return poses, None, skeleton


def _one_csv(path: Path) -> Opened:
    poses, skeleton = read_deeplabcut(path)
    log.warning("'%s' has no boxes: those around the labelled points are taken where --boxes is given", path)
    return poses, None, skeleton


def _annotations(folder: Path) -> list[Path]:
    """The JSON files of a folder, or of its folder annotations; where some are named after keypoints, those."""
    found = sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json")])
    return [path for path in found if "keypoints" in path.stem] or found


def _coco_folder(folder: Path) -> Opened:
    files = _annotations(folder)
    if len(files) == 1:
        return _one_json(files[0])
    of = {name: [path for path in files if role(path.stem) == name] for name in ("training", "validation", "test")}
    train, validation = of["training"], of["validation"] or of["test"]
    if len(train) != 1 or len(validation) != 1:
        raise DataError(
            f"which of {listed(path.name for path in files)} in '{folder}' train and which validate? Expected one file "
            "named train.json and one named val.json, or one alone. Rename them, or name one: --data FILE.json"
        )
    poses, skeleton = read_coco_keypoints(train[0])
    kept, other = read_coco_keypoints(validation[0])
    if other.names != skeleton.names:
        raise DataError(
            f"'{train[0]}' and '{validation[0]}' label different key points: {listed(skeleton.names, 20)}, and "
            f"{listed(other.names, 20)}; expected the same ones in the same order."
        )
    return poses, kept, skeleton


def _projects(folder: Path) -> list[Path]:
    """DeepLabCut's files of labels in a folder, or in the folders of its labeled-data."""
    return sorted(folder.glob(PATTERN)) or sorted(folder.glob(f"labeled-data/*/{PATTERN}"))


def _deeplabcut_folder(folder: Path) -> Opened:
    files = _projects(folder)
    if twice := [path.name for path in files if sum(other.parent == path.parent for other in files) > 1]:
        raise DataError(
            f"'{folder}' has several files of labels for the same images: {listed(twice)}. Expected one. Name it: "
            "--data FILE.csv"
        )
    read = [(path, *read_deeplabcut(path)) for path in files]
    if other := [path for path, _, skeleton in read if skeleton.names != read[0][2].names]:
        raise DataError(
            f"'{other[0]}' labels other body parts than '{read[0][0]}'; expected the same ones in the same order."
        )
    log.warning("'%s' has no boxes: those around the labelled points are taken where --boxes is given", folder)
    return [pose for _, poses, _ in read for pose in poses], None, read[0][2]


def _check(split: str, poses: list[Pose], boxes: Boxes, data: str) -> None:
    """Refuse what gives no images, or with whole frames several answers for one image."""
    if not poses:
        raise DataError(f"'{data}' has no {split} image with a labelled key point. Label some, or check the file.")
    files = [pose.file for pose in poses]
    if missing := [pose for pose in poses if not os.path.isfile(pose.file)]:
        raise DataError(
            f"{len(missing)} {split} images of '{data}' are not there, such as '{missing[0].file}' "
            f"({missing[0].place}). Put them there, or take them out of the labels."
        )
    if boxes == "frame" and len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise DataError(
            f"'{data}' has images with several labelled instances, such as '{twice}', and of a whole frame one is "
            "found alone. Crop to the boxes: --boxes given"
        )
