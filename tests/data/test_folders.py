"""How folders are read: which is a class, which is a split, in which order, and which files are images."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, features
from timm.utils.misc import natural_key as timm_key

from okdc.data import Source, names, open_source, splits
from okdc.data.images import Images
from okdc.errors import DataError
from okdc.recipe import DataSettings


def write(root: Path, *places: str, count: int = 3) -> Path:
    """`count` images in each of the folders."""
    for place in places:
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (40 * i, len(place), 99)).save(root / place / f"{i}.png")
    return root


def opened(root: Path, **changes: Any) -> Source:
    return open_source(replace(DataSettings(data=str(root), workers=0), **changes), 0)


def places(images: Images, source: Source) -> set[tuple[str, str]]:
    """(class, path) of each image."""
    return {
        (source.classes[int(label)], images.dataset.filename(int(index), absolute=False))
        for index, label in zip(images.indices, images.labels, strict=True)
    }


def fails(root: Path, *words: str, **changes: Any) -> None:
    with pytest.raises(DataError) as caught:
        opened(root, **changes)
    for word in words:
        assert word in str(caught.value)


# --- the order of classes -------------------------------------------------------------------------------------------

TIED = ["b", "A", "a", "B", "01", "1", "001", "10", "9", "10²", "²", "Über", "über", "x٣", "x3"]
ORDER = ["001", "01", "1", "9", "10", "10²", "A", "a", "B", "b", "x3", "x٣", "²", "Über", "über"]


@pytest.mark.parametrize("seed", ["0", "1", "3"])
def test_the_order_of_classes_is_the_same_in_every_process(seed: str) -> None:
    code = f"import runpy; print(*runpy.run_path({names.__file__!r})['by_index']({set(TIED)!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert printed.decode().split() == ORDER


def test_names_without_ties_are_in_the_order_of_bundles_that_are_out_there() -> None:
    classes = ["n02", "n1", "Cat 10", "cat 9", "dog", "Éclair", "zoo", "10", "9", "_x", "a-b", "a b"]
    assert list(names.by_index(classes)) == sorted(classes, key=timm_key)


def test_no_two_names_are_tied_and_accents_sort_alike_however_they_are_stored() -> None:
    spellings = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    for order in permutations(["cafz", "Café", *spellings]):
        found = sorted(order, key=names.natural_key)
        assert found[:2] == ["cafz", "Café"] and set(found[2:]) == set(spellings)
        assert found == sorted(found, key=names.natural_key)


def test_classes_that_differ_in_case_or_zeros_keep_their_images(tmp_path: Path) -> None:
    classes = ("001", "01", "1", "10²", "A", "a", "b")
    for split in ("train", "val"):
        write(tmp_path / split, *classes)
    source = opened(tmp_path)
    assert source.classes == classes
    for images in (source.train, source.validation):
        assert places(images, source) == {(name, f"{name}/{i}.png") for name in classes for i in range(3)}


def test_images_with_tied_names_are_in_one_order_whatever_the_disk_says(tmp_path: Path) -> None:
    for name in ("1", "01", "A", "a"):
        for cls in ("x", "y"):
            Image.new("RGB", (8, 8)).save(write(tmp_path, cls, count=0) / cls / f"{name}.png")
    source = opened(tmp_path)
    assert source.train.dataset.paths == [f"{cls}/{name}.png" for cls in "xy" for name in ("01", "1", "A", "a")]


def test_an_accent_stored_in_two_ways_is_one_class(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(tmp_path / "train", composed, "tea")
    write(tmp_path / "val", apart, "tea")
    (tmp_path / "map.txt").write_text(f"tea\n{apart}\n", encoding="utf-8")
    assert opened(tmp_path).classes == (composed, "tea")
    source = opened(tmp_path, class_map=str(tmp_path / "map.txt"))
    assert source.classes == ("tea", composed) and len(source.train) == len(source.validation) == 6
    write(tmp_path / "train", apart)
    fails(tmp_path, "two folders that are both called café", "Put their images together")


def test_names_that_are_no_line_of_text_are_refused_before_training(tmp_path: Path) -> None:
    write(tmp_path, "cat", "dog\nfox")
    fails(tmp_path, r"'dog\nfox'", "rename it")
    (tmp_path / "dog\nfox").rename(tmp_path / os.fsdecode(b"\xff"))
    fails(tmp_path, "no line of text", "rename it")


# --- what is a class ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "."])
def test_a_class_is_a_folder_of_the_first_level(tmp_path: Path, split: str) -> None:
    deep = write(tmp_path, *(f"{split}/{cls}/images" for cls in ("cat", "dog")))
    assert opened(deep).classes == ("cat", "dog")
    write(tmp_path, f"{split}/cat", f"{split}/cat/extra/more")
    source = opened(tmp_path)
    assert source.classes == ("cat", "dog") and len(source.train) + len(source.validation) == 12
    assert {cls for cls, path in places(source.train, source) if path.startswith("cat/")} == {"cat"}


def test_folders_inside_of_classes_do_not_replace_them(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / split, "cat/indoor", "cat/outdoor", "dog/indoor", "dog/outdoor")
    source = opened(tmp_path)
    assert source.classes == ("cat", "dog") and len(source.train) == len(source.validation) == 12
    assert all(path.startswith(cls) for cls, path in places(source.train, source))


def test_groups_of_folders_are_asked_about_and_a_class_map_answers(tmp_path: Path) -> None:
    write(tmp_path / "train", "animals/cat", "animals/dog", "vehicles/bus", "vehicles/car")
    fails(tmp_path, "2 of the first level (animals, vehicles) or 4 inside (cat, dog, bus, car)", "--class-map FILE.txt")
    answers = {"outer": ["vehicles", "animals"], "inner": ["bus", "car", "cat", "dog"]}
    for name, classes in answers.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(classes))
        source = opened(tmp_path, class_map=str(tmp_path / f"{name}.txt"))
        assert source.classes == tuple(classes) and len(source.train) + len(source.validation) == 12
        assert all(cls in path.split("/") for cls, path in places(source.train, source))


def test_class_folders_one_level_too_low(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / split, "images/cat", "images/dog")
    fails(tmp_path, "holds one folder only, 'images'", "(cat, dog)", "--train-split")
    source = opened(tmp_path, train_split="train/images", val_split="val/images")
    assert source.classes == ("cat", "dog")


def test_links_that_lead_back_are_not_followed_and_others_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "pets", "train/cat", "train/dog", "val/cat", "val/dog", "val/cow")
    write(tmp_path / "store", "cow/angus")
    for place, target in (
        ("cat/me", "."), ("cat/up", ".."), ("cat/root", "../../.."), ("cat/dogs", "../dog"), ("cat/self", "self"),
        ("cow", "../../store/cow"), ("dog/images", "."), ("kitty", "cat"),
    ):  # fmt: skip
        (tmp_path / "pets" / "train" / place).symlink_to(target)
    (tmp_path / "store" / "cow" / "back").symlink_to(tmp_path / "pets")
    (tmp_path / "pets" / "train" / "dog" / "linked.png").symlink_to("0.png")
    source = opened(tmp_path / "pets")
    assert source.classes == ("cat", "cow", "dog") and len(source.train) == 10
    assert ("cow", "cow/angus/0.png") in places(source.train, source)
    for link in ("cat/me", "cat/up", "cat/dogs", "cat/root"):
        assert link in caplog.text
    assert "not followed" in caplog.text


def test_what_a_class_map_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "cat", "dog", "Cow")
    (tmp_path / "map.txt").write_text("cat\ndog")
    source = opened(tmp_path, class_map="map.txt")
    assert len(source.train) + len(source.validation) == 6
    assert "leaves out images" in caplog.text and "Cow" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error_not_a_class_less(tmp_path: Path) -> None:
    (write(tmp_path, "cat", "dog") / "cat").chmod(0)
    fails(tmp_path, "cannot be read", "permissions")


# --- what is a split ------------------------------------------------------------------------------------------------

PAIRS = [
    "train/val", "Train/Val", "TRAIN/TEST", "Training/Testing", "training/dev", "train_images/test_images",
    "training_set/test_set", "seg_train/seg_test", "trainset/valset", "train2017/val2017", "TrainImages/EvalImages",
    "train/eval", "train/Test", "train/testing", "train/Valid", "imgs-train/imgs-validation", "01 train/02 test",
]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_splits_are_found_by_their_names_as_people_write_them(tmp_path: Path, pair: str) -> None:
    train, validation = pair.split("/")
    write(tmp_path, *(f"{split}/{cls}" for split in (train, validation) for cls in ("cat", "dog")))
    source = opened(tmp_path)
    assert len(source.train) == len(source.validation) == 6 and source.classes == ("cat", "dog")
    assert source.train.origin.endswith(train) and source.validation.origin.endswith(validation)
    fails(tmp_path / validation, "is one split of", f"--data {tmp_path}")


@pytest.mark.parametrize("name", ["contest", "latest", "evaluate_me", "trainval", "train_test", "terrain", "valley"])
def test_names_that_are_not_of_one_split(name: str) -> None:
    assert splits.role(name) is None


def test_a_validation_split_comes_before_a_test_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, *(f"{split}/{cls}" for split in ("Train", "Val", "test", "more") for cls in ("cat", "dog")))
    assert opened(tmp_path).validation.origin.endswith("Val")
    assert "not used: more" in caplog.text and "test" not in caplog.text.partition("not used: ")[2]


def test_folders_that_hold_the_same_classes_are_asked_about(tmp_path: Path) -> None:
    write(tmp_path / "folds", *(f"{fold}/{cls}" for fold in ("one", "two", "three") for cls in ("cat", "dog")))
    fails(tmp_path / "folds", "the same names (cat, dog)", "--train-split one --val-split", "--class-map FILE.txt")
    (tmp_path / "folds" / "map.txt").write_text("two\none\nthree")
    assert opened(tmp_path / "folds", class_map="map.txt").classes == ("two", "one", "three")
    assert len(opened(tmp_path / "folds", train_split="one", val_split="two").validation) == 6
    write(tmp_path / "more", *(f"{fold}/{cls}" for fold in ("train", "other") for cls in ("cat", "dog")))
    fails(tmp_path / "more", "'train' and 'other'", "--val-split other")
    write(tmp_path / "years", *(f"{fold}/{cls}" for fold in ("train2014", "train2017") for cls in ("cat", "dog")))
    fails(tmp_path / "years", "2 folders for training (train2014, train2017)", "--train-split train2014")


def test_a_class_called_train_that_holds_folders_is_asked_about(tmp_path: Path) -> None:
    write(tmp_path, "bus", "tram", "train/steam", "train/electric")
    fails(tmp_path, "'train' the training split, or one class of several", "bus, tram", "--class-map")
    (tmp_path / "map.txt").write_text("bus\ntrain\ntram")
    source = opened(tmp_path, class_map="map.txt")
    assert source.classes == ("bus", "train", "tram") and len(source.train) + len(source.validation) == 12


def test_splits_inside_of_classes_are_not_one_pile(tmp_path: Path) -> None:
    write(tmp_path, *(f"{cls}/{split}" for cls in ("cat", "dog") for split in ("train", "test")))
    fails(tmp_path, "each of cat, dog in it holds test, train", f"--data {tmp_path / 'cat'}", "train/cat")


def test_a_class_map_does_not_make_one_pile_of_splits_either(tmp_path: Path) -> None:
    write(tmp_path, *(f"images/{split}/{cls}" for split in ("train", "val") for cls in ("cat", "dog")))
    (tmp_path / "map.txt").write_text("\ufeffdog\ncat\n\n", encoding="utf-8")
    fails(tmp_path, f"--data {tmp_path / 'images'}", class_map="map.txt")
    source = opened(tmp_path / "images", class_map=str(tmp_path / "map.txt"))
    assert source.classes == ("dog", "cat") and len(source.train) == len(source.validation) == 6


def test_a_class_called_train_inside_of_a_group_is_no_split(tmp_path: Path) -> None:
    write(tmp_path, "vehicles/train", "vehicles/bus", "animals/cat", "animals/dog")
    fails(tmp_path, "2 of the first level (animals, vehicles) or 4 inside (cat, dog, bus, train)")


def test_a_folder_called_like_a_split_beside_other_things_is_a_data_set(tmp_path: Path) -> None:
    write(tmp_path, "test_data/cat", "test_data/dog", "train/scripts", "val/scripts")
    assert opened(tmp_path / "test_data").classes == ("cat", "dog")


def test_the_splits_that_are_named_are_two(tmp_path: Path) -> None:
    write(tmp_path, *(f"{split}/{cls}" for split in ("val", "test") for cls in ("cat", "dog")))
    assert opened(tmp_path, train_split="val").validation.origin.endswith("test")


def test_one_folder_that_trains_and_validates_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "train/cat", "train/dog")
    (tmp_path / "val").symlink_to("train")
    assert len(opened(tmp_path).validation) == 6
    assert "val' trains and validates" in caplog.text


def test_the_layout_of_object_detection(tmp_path: Path) -> None:
    write(tmp_path / "boxes", "images/train", "images/val")
    write(tmp_path / "boxes", "labels/train", "labels/val", count=0)
    fails(tmp_path / "boxes", "images' holds train/", "object detection", "one folder per class")
    write(tmp_path / "both", "images/train/cat", "images/val/cat", "images/train/dog", "images/val/dog")
    write(tmp_path / "both", "labels/train/cat", count=0)
    fails(tmp_path / "both", f"--data {tmp_path / 'both' / 'images'}")


# --- what is an image -----------------------------------------------------------------------------------------------


def test_hidden_files_and_folders_are_no_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / split, "cat", "dog", ".cache", "cat/.thumbs", "__MACOSX/cat", "dog/@eaDir/0.png")
        for cls in ("cat", "dog"):
            for i in range(3):
                (tmp_path / split / cls / f"._{i}.png").write_bytes(b"\0\5\26\7")
        (tmp_path / split / "._0.png").write_bytes(b"\0\5\26\7")
    source = opened(tmp_path)
    assert source.classes == ("cat", "dog") and len(source.train) == len(source.validation) == 6


@pytest.mark.parametrize("name", ["imagenet", "inaturalist"])
def test_hidden_files_are_no_images_where_torchvision_reads_folders(tmp_path: Path, name: str) -> None:
    classes = [f"{i:05d}_Animalia_a_b_c_d_e_{cls}" for i, cls in enumerate(("cat", "dog"))]
    if name == "imagenet":
        torch.save(({cls: (cls,) for cls in classes}, []), tmp_path / "meta.bin")
    for split in ("train", "val") if name == "imagenet" else ("2021_train", "2021_valid"):
        for cls in classes:
            (write(tmp_path / split, cls) / cls / "._0.png").write_bytes(b"\0\5\26\7")
    source = open_source(DataSettings(data=f"torch/{name}:{tmp_path}"), 0)
    for images in (source.train, source.validation):
        assert len(images) == len(images.labels) == 6
        assert [images[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]


def test_images_of_all_usual_kinds_are_read_and_other_files_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {"gif": "GIF", "jfif": "JPEG", "jpe": "JPEG", "JPG": "JPEG", "webp": "WEBP", "bmp": "BMP"}
    if features.check("avif"):  # Pillow may be built without it
        kinds |= {"avif": "AVIF"}
    for cls in ("cat", "dog"):
        for ending, kind in kinds.items():
            Image.new("RGB", (8, 8)).save(write(tmp_path, cls, count=0) / cls / f"x.{ending}", kind)
        for name in ("a.txt", "b.txt", "c.dng", "README", "Thumbs.db", ".DS_Store"):
            (tmp_path / cls / name).write_text("x")
    (tmp_path / "classes.txt").write_text("cat\ndog")
    source = opened(tmp_path)
    assert len(source.train) + len(source.validation) == 2 * len(kinds)
    assert all(images[i][0].size == (8, 8) for images in (source.train, source.validation) for i in range(len(images)))
    assert "left out: 4 of .txt, 2 of .dng, 2 of no ending" in caplog.text
