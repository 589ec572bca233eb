"""Every layout of key points, written small by the test, is read as the same instances; what is wrong is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from okdc.data.keypoints import in_blocks, open_keypoints, pairs_of
from okdc.data.poses import Pose
from okdc.errors import DataError
from okdc.tasks.shared.skeleton import COCO, Skeleton

NAMES = ("nose", "left_ear", "right_ear")
POINTS = [[10.0, 12.0, 1.0], [20.0, 8.0, 1.0], [0.0, 0.0, 0.0]]  # the last has no label
COUNT = 20


def images(folder: Path, count: int = COUNT) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"img{i}.png" for i in range(count)]
    for name in names:
        Image.new("RGB", (64, 48)).save(folder / name)
    return names


def coco(names: list[str], **category: Any) -> dict[str, Any]:
    flat = [value for x, y, w in POINTS for value in (x, y, 2 * int(w))]
    return {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [5, 4, 30, 20], "area": 400, "keypoints": flat}
            for i in range(len(names))
        ],
        "categories": [{"id": 1, "name": "mouse", "keypoints": list(NAMES), "skeleton": [[1, 2]], **category}],
    }


def write_coco(root: Path, split: str, content: dict[str, Any]) -> None:
    root.mkdir(exist_ok=True)
    (root / f"{split}.json").write_text(json.dumps(content))


def test_coco_of_two_files(tmp_path: Path) -> None:
    names = images(tmp_path / "images")
    write_coco(tmp_path, "train", coco(names[:15], flip_pairs=[[1, 2]], sigmas=[0.1, 0.2, 0.3]))
    write_coco(tmp_path, "val", coco(names[15:]))
    source = open_keypoints(str(tmp_path))
    assert source.skeleton == Skeleton(NAMES, ((0, 1),), ((1, 2),), (0.1, 0.2, 0.3))
    assert (len(source.train), len(source.validation), source.margin) == (15, 5, 1.25)
    image, points, meta = source.train[3]
    assert image.size == (64, 48) and points.tolist() == POINTS
    assert (meta.box, meta.area, meta.length) == ((5, 4, 30, 20), 400, 30) and meta.file.endswith("img3.png")
    whole = open_keypoints(str(tmp_path), "frame")
    assert whole.train[3][2].box == (-0.5, -0.5, 64, 48) and whole.margin == 1 and whole.boxes == "frame"


def test_coco_as_it_is_downloaded(tmp_path: Path) -> None:
    for split in ("train", "val"):
        names = images(tmp_path / f"{split}2017", 3)
        write_coco(tmp_path / "annotations", f"person_keypoints_{split}2017", coco(names))
        write_coco(tmp_path / "annotations", f"instances_{split}2017", {"images": []})
    source = open_keypoints(str(tmp_path))
    assert len(source.train) == 3 and Path(source.validation[0][2].file).parent.name == "val2017"


def test_people_have_the_pairs_and_sigmas_that_coco_gave_them(tmp_path: Path) -> None:
    content = coco(images(tmp_path), keypoints=list(COCO))
    for entry in content["annotations"]:
        entry["keypoints"] = [5, 5, 2] * len(COCO)
    write_coco(tmp_path, "all", content)
    skeleton = open_keypoints(str(tmp_path)).skeleton
    assert skeleton.sigmas[5] == 0.079 and skeleton.pairs is not None and (1, 2) in skeleton.pairs


def test_one_file_is_split_in_blocks_of_consecutive_images(tmp_path: Path) -> None:
    content = coco(images(tmp_path))
    content["annotations"] += [entry | {"id": 100 + entry["id"]} for entry in content["annotations"]]
    write_coco(tmp_path, "labels", content)
    source = open_keypoints(str(tmp_path))
    held = [Path(pose.file).name for pose in source.validation.poses]
    assert held == [f"img{i}.png" for i in (4, 5, 14, 15)] * 2  # both instances of an image are on one side
    assert len(source.train) == 2 * COUNT - 8 and "blocks" in source.name


@pytest.mark.parametrize(("count", "held"), [(2, [1]), (3, [1]), (5, [2]), (10, [2, 7])])
def test_a_few_images_are_split_too(count: int, held: list[int]) -> None:
    poses = [Pose("", f"a/{i}.png", ((1, 1, 1),), (0, 0, 1, 1), 1) for i in range(count)]
    assert [int(Path(pose.file).stem) for pose in in_blocks(poses, "x")[1]] == held
    with pytest.raises(DataError, match="1 images in a, too few"):
        in_blocks(poses[:1], "x")


def deeplabcut(root: Path, several: bool, columns: int) -> Path:
    """A project whose labels name each image in one cell or in three, of one animal or of two and a point of none."""
    names = images(root / "labeled-data" / "film")
    animals = ["mus1", "mus2"] if several else [""]
    titles = ["scorer", *(["individuals"] if several else []), "bodyparts", "coords"]
    parts = [(animal, part, axis) for animal in animals for part in NAMES for axis in "xy"]
    parts += [("single", "corner", axis) for axis in "xy"] if several else []
    header = {"scorer": ["me"] * len(parts), "individuals": [p[0] for p in parts]}
    header |= {"bodyparts": [p[1] for p in parts], "coords": [p[2] for p in parts]}
    lines = [[title, *[""] * (columns - 1), *header[title]] for title in titles]
    for i, name in enumerate(names):
        place = ["/".join(["labeled-data", "film", name])] if columns == 1 else ["labeled-data", "film", name]
        one = [str(value) if w else "" for x, y, w in POINTS for value in (x, y)]
        other = [""] * 6 if i == 0 else one  # in the first image the second animal is not to be seen
        lines.append([*place, *one, *(other + ["1", "1"] if several else [])])
    file = root / "labeled-data" / "film" / "CollectedData_me.csv"
    file.write_text("\n".join(",".join(line) for line in lines))
    return file


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("several", [False, True])
def test_deeplabcut_in_its_four_forms(
    tmp_path: Path, several: bool, columns: int, caplog: pytest.LogCaptureFixture
) -> None:
    file = deeplabcut(tmp_path, several, columns)
    with caplog.at_level(logging.WARNING, "okdc"):
        source = open_keypoints(str(tmp_path))
    assert "has no boxes" in caplog.text and ("belong to no animal" in caplog.text) == several
    assert source.skeleton.names == NAMES and source.skeleton.pairs is None
    assert len(source.train) + len(source.validation) == (2 * COUNT - 1 if several else COUNT)
    image, points, meta = source.train[0]
    assert image.size == (64, 48) and points.tolist() == POINTS and meta.box == (10, 8, 10, 4)
    assert [pose.file for pose in open_keypoints(str(file)).train.poses] == [pose.file for pose in source.train.poses]
    if several:
        with pytest.raises(DataError, match=r"several labelled instances.*--boxes given"):
            open_keypoints(str(tmp_path), "frame")


def yolo(root: Path, **settings: Any) -> Path:
    for split in ("train", "val"):
        names = images(root / "images" / split, 3)
        (root / "labels" / split).mkdir(parents=True)
        for name in names[1:]:  # the first image shows nothing
            flat = [f"{x / 64} {y / 48} {2 * int(w)}" for x, y, w in POINTS]
            line = f"0 {20 / 64} {14 / 48} {30 / 64} {20 / 48} {' '.join(flat)}\n"
            (root / "labels" / split / name).with_suffix(".txt").write_text(line)
    content = {"train": "images/train", "val": "images/val", "names": {0: "mouse"}, "kpt_shape": [3, 3], **settings}
    (root / "data.yaml").write_text(json.dumps(content))  # which is YAML
    return root / "data.yaml"


def test_yolo_pose(tmp_path: Path) -> None:
    file = yolo(tmp_path, flip_idx=[0, 2, 1], kpt_names={0: list(NAMES)})
    source = open_keypoints(str(tmp_path))
    assert source.skeleton.names == NAMES and source.skeleton.pairs == ((1, 2),)
    assert (len(source.train), len(source.validation)) == (2, 2)
    _, points, meta = source.validation[0]
    assert points.flatten().tolist() == pytest.approx([value for point in POINTS for value in point])
    assert meta.box == pytest.approx((5, 4, 30, 20)) and meta.area == pytest.approx(0.53 * 600)
    yolo(tmp_path / "b", flip_idx=[0, 1, 2])
    other = open_keypoints(str(tmp_path / "b" / "data.yaml"))
    assert other.skeleton.names == ("point0", "point1", "point2") and other.skeleton.pairs == ()  # said to be none
    file.write_text(file.read_text().replace('"mouse"', '"mouse", "1": "rat"'))
    with pytest.raises(DataError, match="2 classes; expected one"):
        open_keypoints(str(file))


def test_a_mirror_needs_pairs_or_the_word_that_there_are_none(tmp_path: Path) -> None:
    write_coco(tmp_path, "all", coco(images(tmp_path), flip_pairs=[]))
    source = open_keypoints(str(tmp_path))
    source.check_flips(0)
    with pytest.raises(DataError, match=r"--flip-pairs left_ear/right_ear;.*--flip-pairs none.*--hflip 0"):
        source.check_flips(0.5)
    for given, pairs in (("left_ear/right_ear", ((1, 2),)), ("none", ())):
        said = open_keypoints(str(tmp_path), flip_pairs=given)
        said.check_flips(0.5)
        assert said.skeleton.pairs == pairs
    write_coco(tmp_path, "all", coco(images(tmp_path), flip_pairs="none"))
    open_keypoints(str(tmp_path)).check_flips(0.5)
    with pytest.raises(DataError, match=r"There is no left_eer. Did you mean left_ear"):
        pairs_of("left_eer/right_ear", NAMES)
    with pytest.raises(DataError, match="each name once"):
        pairs_of("left_ear/right_ear,left_ear/nose", NAMES)


def mend(content: dict[str, Any], section: str, **entry: Any) -> dict[str, Any]:
    content[section][0] |= entry
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: mend(c, "annotations", keypoints=[1, 2, 2]), "annotation 0 of all.json has 3 numbers.*of 3"),
        (lambda c: mend(c, "annotations", keypoints=[float("nan")] * 9), "finite"),
        (lambda c: mend(c, "annotations", bbox=[1, 1, 0, 5]), "width and height above 0"),
        (lambda c: mend(c, "annotations", image_id=99), "not laid out as needed .KeyError: 99"),
        (lambda c: mend(c, "images", file_name="other.png"), "images of .* not found: the first is other.png"),
        (lambda c: mend(c, "images", id=1), "an id twice"),
        (lambda c: mend(c, "categories", flip_pairs=[[1, 3]]), r"numbers from 0.*\(1, 3\)"),
        (lambda c: mend(c, "categories", sigmas=[1]), "as many sigmas, got 1 sigmas"),
        (lambda c: mend(c, "categories", keypoints=[]), "no categories with keypoints; expected one"),
        (lambda c: c | {"annotations": []}, "too few to set some aside|no training image"),
        (lambda c: {"images": []}, "not laid out as needed"),
    ],
)
def test_what_is_wrong_in_a_file_of_coco_is_said(tmp_path: Path, change: Any, message: str) -> None:
    write_coco(tmp_path, "all", change(coco(images(tmp_path, 3))))
    with pytest.raises(DataError, match=message):
        open_keypoints(str(tmp_path))


def test_what_is_no_file_of_labels_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; expected figures, COCO"):
        open_keypoints(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="has no key points that okdc can read"):
        open_keypoints(str(tmp_path))
    file = deeplabcut(tmp_path, False, 1)
    file.write_text(file.read_text().replace("coords,x,y", "coords,x,y,likelihood").replace("nose", "nose,nose", 1))
    with pytest.raises(DataError, match=r"rows of different lengths"):
        open_keypoints(str(file))
    file.write_text("scorer,me,me,me\nbodyparts,nose,nose,nose\ncoords,x,y,likelihood\na.png,1,2,0.9\n")
    with pytest.raises(DataError, match="has predictions, not labels"):
        open_keypoints(str(file))
    file.write_text("path,label\na.png,cat\nb.png,dog\nc.png,dog\n")
    with pytest.raises(DataError, match="expected DeepLabCut's rows scorer"):
        open_keypoints(str(file))


def test_two_files_that_do_not_say_what_they_are_for(tmp_path: Path) -> None:
    names = images(tmp_path)
    write_coco(tmp_path, "one", coco(names))
    write_coco(tmp_path, "two", coco(names))
    with pytest.raises(DataError, match=r"which of one.json, two.json .*--data FILE.json"):
        open_keypoints(str(tmp_path))


def test_images_that_went_are_told(tmp_path: Path) -> None:
    names = images(tmp_path)
    write_coco(tmp_path, "all", coco(names))
    (tmp_path / names[3]).unlink()
    with pytest.raises(DataError, match=r"1 training images .*img3.png.*annotation 3 of all.json"):
        open_keypoints(str(tmp_path))
