"""Open what `--data` names: digits, a folder, a file of labels, or a prefix of timm's create_dataset."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from timm.data import create_dataset

from okdc.data.arrays import is_arrays, open_arrays
from okdc.data.cells import TABLES
from okdc.data.folders import open_folder
from okdc.data.hints import check_file, of_folder
from okdc.data.images import Images, check, labels_of, names_by_index, split_in_two
from okdc.data.keypoints import open_keypoints
from okdc.data.poses import PoseSource
from okdc.data.scan import Files, is_visible
from okdc.data.streams import Stream, stream_classes
from okdc.data.tables import is_table, open_table
from okdc.data.values import Source
from okdc.errors import DataError, nearest
from okdc.ranks import first
from okdc.recipe import STREAMS, DataSettings
from okdc.tasks.task import MAPS, Task

PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets"}
TORCH_NAMES = (
    *("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"),
    *("imagenet", "places365", "inaturalist"),
)

VALIDATION_NAMES = ("validation", "val", "valid", "test")  # of splits, in data sets that have no folders

Split = TypeVar("Split")


def open_together(settings: DataSettings, seed: int, task: Task | None = None) -> Source | PoseSource:
    """`open_source` for all ranks: files are found by the first one, which tells the others; what else there is opens
    itself on each, when the first has it (and has downloaded it).
    """
    own: list[Source | PoseSource] = []

    def find() -> Source | PoseSource | None:
        own.append(open_source(settings, seed, task))
        splits = (own[0].train, own[0].validation)
        return own[0] if all(isinstance(getattr(split, "dataset", None), Files) for split in splits) else None

    found = first(find)
    return own[0] if own else found or open_source(settings, seed, task)


def open_source(settings: DataSettings, seed: int, task: Task | None = None) -> Source | PoseSource:
    """Open and check the data set that `settings.data` names; raises DataError for what could not be trained on.

    `digits`, a folder, labels as .csv, .tsv, .jsonl or .json, arrays as .npz, `torch/NAME` (files in ./data, or in ROOT
    with `torch/NAME:ROOT`) and `hfds/ID` are read image by image. `wds/PATH`, `hfids/ID` and `tfds/NAME` are streams:
    see okdc.data.streams for what that costs. `seed` shuffles the streams; it never decides which images validate.
    """
    prefix = settings.data.partition("/")[0].lower() if "/" in settings.data else ""
    if task is not None and task.dims == MAPS:
        boxes: Any = settings.boxes
        return open_keypoints(settings.data, boxes, settings.flip_pairs or "", settings.exif)
    several = task is not None and task.several
    if several and not (is_table(settings) and Path(settings.data).expanduser().is_file()):
        raise DataError(
            f"--data {settings.data} gives each image one class; --task {task.name if task else ''} expects a table "
            "(.csv, .tsv, .jsonl: a path, then a column of 0 and 1 for each label, or one column with the labels "
            "between |), or COCO's .json. Or pass a loader of your own with rows of 0 and 1."
        )
    _require_package(settings.data, PACKAGES.get(prefix))
    table = any(given.lower().endswith(TABLES) for given in (settings.data, settings.val_split))
    if (settings.path_column or settings.label_column) and not table:
        raise DataError(
            f"--path-column and --label-column are those of a table, and --data {settings.data} is none; expected a "
            "file that ends in .csv, .tsv or .jsonl. Leave them out, or check --data."
        )
    if f"{prefix}/" in STREAMS:
        return _stream(settings, prefix, seed)
    if settings.data == "digits":
        source = _digits()
    elif prefix in ("torch", "hfds"):
        source = _named(settings, prefix)
    elif is_arrays(settings.data):
        source = open_arrays(settings)
    elif is_table(settings):
        source = open_table(settings, several)
    else:
        return _folder(settings)
    check(source)
    return source


def _folder(settings: DataSettings) -> Source:
    root = Path(settings.data).expanduser()
    check_file(root, settings.data)
    try:
        source = open_folder(settings)
        check(source)
    except DataError as error:
        raise DataError(f"{error}{of_folder(root) if os.path.isdir(root) else ''}") from error
    return source


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    images = [(Image.fromarray(array), int(label)) for array, label in zip(pixels, digits.target)]
    train, validation = Images(images, torch.as_tensor(digits.target, dtype=torch.int64), "digits").split(5)
    return Source(train, validation, tuple(str(name) for name in digits.target_names), "digits")


def _require_package(given: str, package: str | None) -> None:
    if package and importlib.util.find_spec(package) is None:
        command = f"pip install {package}" + (" tensorflow" if package.startswith("tensorflow") else "")
        raise DataError(f"--data {given} needs the package '{package}', which is not installed: {command}")


def _named(settings: DataSettings, prefix: str) -> Source:
    name, root = settings.data, None
    if prefix == "torch":
        name, _, root = settings.data.partition(":")
        _check_torch_name(name.partition("/")[2])
        root = root or "data"

    def open_split(split: str) -> Images:
        dataset = _create(settings, name, root=root, split=split)
        labels, visible = labels_of(dataset, settings.data), _visible(dataset)
        return Images(dataset, labels[visible], settings.data, visible)

    train = open_split(settings.train_split)
    classes = _class_names(train)
    validation = _validation_split(settings, open_split)
    if validation is None:
        return split_in_two(train, classes, name)
    return Source(train, validation, classes, name)


def _visible(dataset: Any) -> torch.Tensor:
    """The positions of images, (N,); torchvision takes hidden files for images where it reads folders."""
    files = [path for path, _ in getattr(dataset, "samples", [])]  # torch/imagenet
    files = files or [file for _, file in getattr(dataset, "index", [])]  # torch/inaturalist
    hidden = {i for i, file in enumerate(files) if not is_visible(os.path.basename(file))}
    return torch.tensor([i for i in range(len(dataset)) if i not in hidden], dtype=torch.int64)


def _check_torch_name(name: str) -> None:
    if name.lower() not in TORCH_NAMES:
        raise DataError(
            f"'{name}' is not a data set of torchvision; expected torch/ and one of "
            f"{', '.join(TORCH_NAMES)}.{nearest(name, TORCH_NAMES)}"
        )


def _class_names(images: Images) -> tuple[str, ...]:
    if names := getattr(images.dataset, "classes", None):
        return tuple(str(name) for name in names)
    indices = getattr(getattr(images.dataset, "reader", None), "class_to_idx", None)
    return names_by_index(indices or {str(label): label for label in range(int(images.labels.max()) + 1)})


def _stream(settings: DataSettings, prefix: str, seed: int) -> Source:
    root = settings.data.partition("/")[2] if prefix == "wds" else None
    # webdataset stores plain indices: there the class map names them, elsewhere timm maps names to indices with it.
    class_map = "" if prefix == "wds" else settings.class_map

    def open_split(split: str, training: bool = False) -> Stream:
        def create(batch_size: int) -> Any:
            options = {"is_training": training, "batch_size": batch_size, "seed": seed, "class_map": class_map}
            dataset = _create(settings, settings.data, root=root, split=split, **options)
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1  # ranks divide it by `stream_reading`
            return dataset

        create(1)  # so that a wrong name or split is an error now, not at the first batch
        return Stream(create)

    train = open_split(settings.train_split, training=True)
    return Source(train, _validation_split(settings, open_split), stream_classes(train, settings), settings.data)


def _create(settings: DataSettings, name: str, **options: Any) -> Any:
    options = {"download": settings.dataset_download, "class_map": settings.class_map or None, **options}
    try:
        return create_dataset(name, **options)
    except (RuntimeError, ValueError, AssertionError, OSError, KeyError) as error:
        where = f" in the folder '{options['root']}'" if options["root"] else ""
        fetched = settings.dataset_download or not name.lower().startswith(("torch/", "tfds/"))
        download = "" if fetched else ", or let it be fetched with --dataset-download"
        raise DataError(
            f"cannot open '{name}', split '{options['split']}'{where} ({type(error).__name__}: {error}). Check the "
            f"name, --train-split and --val-split{download}."
        ) from error


def _validation_split(settings: DataSettings, open_split: Callable[[str], Split]) -> Split | None:
    """The split that was asked for, or, when none was, the first that exists of those that usually validate."""
    if settings.val_split not in VALIDATION_NAMES:
        return open_split(settings.val_split)
    for name in dict.fromkeys((settings.val_split, *VALIDATION_NAMES)):
        try:
            return open_split(name)
        except DataError as error:
            if isinstance(error.__cause__, OSError):
                raise  # a disk or a network that failed, which says nothing of the splits that exist
    return None
