"""What is given as --data and is no data set as okdc reads it: what it seems to be, and what to type, which works."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from okdc.data import open_source
from tests.helpers.images import fails, settings, write, write_split

CLASSES = ("cat", "dog")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pets.7z", "an archive. Unpack it"),
        ("labels.xlsx", "spreadsheet: save the sheet as CSV UTF-8"),
        ("a.parquet", "pandas.read_parquet('{}/a.parquet').to_csv('{}/a.csv', index=False)"),
        ("a.h5", "okdc.compress(model, loader)"),
        ("data.yaml", "Name the folder of the images"),
        ("a.jpg", "one image: name the folder"),
        ("a.what", ".csv, .tsv, .jsonl, .json"),
    ],
)
def test_files_of_other_kinds(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_text("x")
    fails(settings(tmp_path / name), "is a file", words.replace("{}", str(tmp_path)))


def command(error: str, begin: str) -> None:
    """Run what an error says to type, from where it begins to its end."""
    subprocess.run(["bash", "-c", begin + error.partition(begin)[2].rstrip(".")], check=True)


def said(given: Path) -> str:
    with pytest.raises(Exception, match=given.name) as caught:
        open_source(settings(given), 0)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_an_archive_is_told_how_to_unpack(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path / "s" / "train")
    write_split(tmp_path / "s" / "val", 2)
    name = shutil.make_archive(str(tmp_path / "o" / "pets"), kind, tmp_path / "s")
    begin = {"zip": "unzip", "gztar": "mkdir"}[kind]
    if shutil.which("unzip") is None and kind == "zip":
        assert f"unzip -q '{name}' -d '{tmp_path / 'o' / 'pets'}'" in said(Path(name))
        return
    command(said(tmp_path / "o"), begin)
    shutil.rmtree(tmp_path / "o" / "pets")
    command(said(Path(name)), begin)
    assert len(open_source(settings(tmp_path / "o" / "pets"), 0).validation) == 8


def test_an_address_is_no_folder() -> None:
    fails(settings("https://a.example/pets.zip"), "is an address", "Download and unpack")


def test_a_list_without_header_is_told_how_to_become_a_table(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / f"{i}.png", i)
    (tmp_path / "list.txt").write_text("".join(f"{i}.png {i % 2}\n" for i in range(20)))
    command(said(tmp_path / "list.txt"), "(echo")
    assert open_source(settings(tmp_path / "list.csv"), 0).classes == ("0", "1")


def test_names_that_begin_with_the_class_are_told_how_to_be_sorted(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / "train" / f"{CLASSES[i % 2]}.{i}.jpg", i)
        write(tmp_path / "test1" / f"{i}.jpg", i)
    command(said(tmp_path), "(cd")
    source = open_source(settings(tmp_path), 0)
    assert source.classes == CLASSES and len(source.train) + len(source.validation) == 20
    for i in range(20):
        write(tmp_path / "phone" / f"IMG_{i}.jpg", i)
    assert "(cd" not in said(tmp_path / "phone")


def test_files_of_labels_are_found(tmp_path: Path) -> None:
    root = tmp_path / "kaggle"
    for name in ("train/0.jpg", "test/0.jpg"):
        write(root / name)
    (root / "train.csv").write_text("id,label\n")
    (root / "sample_submission.csv").write_text("id,label\n")
    fails(settings(root), f"labels are in train.csv: --data {root / 'train.csv'}")
    fails(settings(root / "train"), f"--data {root / 'train.csv'}")
    root = tmp_path / "flow"
    for split in ("test", "train", "valid"):
        write(root / split / "0.jpg")
        (root / split / "_classes.csv").write_text("filename, cat, dog\n")
    second = root / "valid" / "_classes.csv"
    fails(settings(root), f"--data {root / 'train' / '_classes.csv'} --val-split {second}")
    write_split(root / "train", 2, CLASSES)
    (root / "train" / "0.jpg").unlink()
    (root / "train" / "_classes.csv").unlink()
    fails(settings(root), f"--data {root} --val-split {second}")


def test_data_sets_as_they_are_downloaded(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    for given in (tmp_path, tmp_path / "cifar-10-batches-py"):
        fails(settings(given), f"--data torch/cifar10:{tmp_path}")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "train-images-idx3-ubyte").write_text("x")
    fails(settings(tmp_path / "m"), "MNIST/raw'", f"then --data torch/mnist:{tmp_path / 'm'}")
    write_split(tmp_path / "i" / "ILSVRC" / "Data" / "train", 2, CLASSES)
    fails(settings(tmp_path / "i"), f"--data {tmp_path / 'i' / 'ILSVRC' / 'Data'}")
    write(tmp_path / "i" / "ILSVRC" / "Data" / "val" / "ILSVRC2012_val_00000001.JPEG")
    fails(settings(tmp_path / "i" / "ILSVRC" / "Data"), "cut -d' ' -f1 LOC_val_solution.csv > val.csv")


def test_images_that_are_unlabelled_test_images_do_not_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_split(tmp_path / "train")
    write(tmp_path / "test" / "0.jpg")
    assert "(90/10 split)" in open_source(settings(tmp_path), 0).name
    assert f"'{tmp_path / 'test'}' holds images without class folders, and is not used" in caplog.text
    write(tmp_path / "val" / "0.jpg")
    fails(settings(tmp_path), "val' holds images but no class folders")


def test_folds_inside_of_train_are_read_by_a_class_map(tmp_path: Path) -> None:
    for fold in ("fold1", "fold2", "fold3"):
        write_split(tmp_path / fold, 2, CLASSES)
    fails(settings(tmp_path), "'fold1' and 'fold2'", "To train on several, move them into one train/")
    (tmp_path / "train").mkdir()
    for fold in ("fold1", "fold2"):
        (tmp_path / fold).rename(tmp_path / "train" / fold)
    (tmp_path / "fold3").rename(tmp_path / "val")
    fails(settings(tmp_path), "do not have the same classes", "--class-map FILE.txt")
    (tmp_path / "map.txt").write_text("cat\ndog\n")
    source = open_source(settings(tmp_path, class_map="map.txt"), 0)
    assert source.classes == CLASSES and (len(source.train), len(source.validation)) == (8, 4)


def arrays(path: Path, keys: str = "train_images train_labels val_images val_labels", **changes: np.ndarray) -> Path:
    content = {}
    for key in keys.split():
        count = 12 if "train" in key else 6
        labels = np.arange(count, dtype=np.uint8) % 3
        images = np.full((count, 8, 8, 3), 80, np.uint8) * (labels + 1)[:, None, None, None]
        content[key] = images if "images" in key or key[0] == "x" else labels[:, None]
    np.savez(path, **(content | changes))  # type: ignore[arg-type]
    return path


def test_arrays_of_medmnist_and_keras(tmp_path: Path) -> None:
    medmnist = "train_images train_labels val_images val_labels test_images test_labels"
    for keys, validates in ((medmnist, "val_images"), ("x_train y_train x_test y_test", "x_test")):
        source = open_source(settings(arrays(tmp_path / "a.npz", keys)), 0)
        assert source.classes == ("0", "1", "2") and (len(source.train), len(source.validation)) == (12, 6)
        assert source.validation.origin.endswith(f"({validates})")
        image, label = source.train[4]
        assert (image.mode, image.size, image.getpixel((0, 0)), label) == ("RGB", (8, 8), (160, 160, 160), 1)
    (tmp_path / "map.txt").write_text("benign\nmalign\nnone\n")
    given = arrays(tmp_path / "a.npz", medmnist)
    source = open_source(settings(given, val_split="test", class_map="map.txt"), 0)
    assert source.classes == ("benign", "malign", "none") and source.validation.origin.endswith("(test_images)")
    fails(settings(given, val_split="nope"), "no split 'nope'", "val, test", "--val-split val")
    grey = arrays(tmp_path / "g.npz", "train_labels", train_images=np.zeros((12, 8, 8, 1), np.uint8))
    source = open_source(settings(grey), 0)
    assert "(90/10 split)" in source.name and source.train[0][0].mode == "L"


def test_arrays_that_cannot_be_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    fails(settings(arrays(path, train_labels=np.zeros((12, 14), np.uint8))), "labels of shape (12, 14)", "MedMNIST")
    fails(settings(arrays(path, train_images=np.zeros((12, 8, 8), np.float32))), "float32")
    fails(settings(arrays(path, "val_images val_labels")), "no split 'train'")
    fails(settings(arrays(path, "train_images")), "cannot be read (KeyError")
    for content in (b"x", b"", b"PK\3\4", b"\x93NUMPY\1\0"):
        path.write_bytes(content)
        fails(settings(path), "cannot be read")
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    fails(settings(path), "cannot be read")
