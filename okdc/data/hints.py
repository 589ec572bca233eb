"""What people give as --data and okdc does not read: what it seems to be, and what to type."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from shlex import quote

from okdc.data.cells import ENDINGS
from okdc.data.names import listed, natural_key
from okdc.data.scan import entries, folders, is_image
from okdc.data.splits import role
from okdc.errors import DataError

ARCHIVES = {  # how names end -> what to do with such a file
    (".zip",): "Unpack it: unzip -q '{path}' -d '{stem}'",
    (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"): (
        "Unpack it: mkdir -p '{stem}' && tar -xf '{path}' -C '{stem}'"
    ),
    (".7z", ".rar", ".gz"): "It is an archive. Unpack it",
}
KINDS = ARCHIVES | {
    (".xlsx", ".xls", ".ods", ".numbers"): "It is a spreadsheet: save the sheet as CSV UTF-8, and name that file",
    (".txt", ".lst"): (
        "Is it a list of paths and labels? Give it a header: "
        "(echo path,label; sed 's/[[:space:]]\\+/,/' '{path}') > '{stem}.csv'"
    ),
    (".parquet", ".feather"): (
        'If it has paths and labels, make a CSV of it: python -c "import pandas; '
        "pandas.read_parquet('{path}').to_csv('{stem}.csv', index=False)\""
    ),
    (".npy", ".h5", ".hdf5", ".pkl", ".pickle", ".mat", ".pt", ".pth", ".tfrecord", ".lmdb", ".mdb"): (
        "Arrays and databases are read by a loader of your own: okdc.compress(model, loader)"
    ),
    (".yaml", ".yml"): "Name the folder of the images instead of their description",
}


def check_file(path: Path, given: str) -> None:
    """Raise DataError, with what to do, for a file that is no table and for an address."""
    if re.match("[a-z0-9]+://", given):
        raise DataError(
            f"--data {given} is an address; expected a folder or a file here. Download and unpack it first."
        )
    if not path.is_file():
        return
    advice = [advice for endings, advice in KINDS.items() if path.name.lower().endswith(endings)]
    if is_image(path.name):
        advice = ["It is one image: name the folder that holds all"]
    stem = path.with_name(path.name.partition(".")[0] or path.name)
    raise DataError(
        f"--data '{given}' is a file; expected a folder with train/ and val/, or a table of paths and labels "
        f"({', '.join(ENDINGS)}), or .npz. {advice[0].format(path=path, stem=stem) if advice else 'Name one of these'}."
    )


def of_folder(root: Path) -> str:
    """What a folder may be that is not laid out as expected, as the end of an error; nothing where that is open."""
    found = _data_sets(root) or _inside(root) or _labels(root) or _by_name(root) or _archives(root)
    return found and f" {found}"


def _files(folder: Path) -> list[str]:
    return sorted((entry.name for entry in entries(folder) if entry.is_file()), key=natural_key)


def _data_sets(root: Path) -> str:
    """The files of CIFAR and MNIST as they are downloaded, and ImageNet's flat val/."""
    for name, kept in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        if root.name == kept or (root / kept).is_dir():
            folder = root.parent if root.name == kept else root
            return f"It holds CIFAR's own files: --data {quote(f'torch/{name}:{folder}')}"
    for inner, name in (
        (".", "mnist"),
        ("MNIST/raw", "mnist"),
        ("raw", "mnist"),
        ("FashionMNIST/raw", "fashion_mnist"),
    ):
        if any((root / inner).glob("*-idx3-ubyte*")):
            place = "MNIST/raw" if name == "mnist" else "FashionMNIST/raw"
            move = f"mkdir -p '{root / place}' && mv '{root / inner}'/*-ubyte* '{root / place}', then "
            return f"It holds MNIST's own files: {'' if inner == place else move}--data {quote(f'torch/{name}:{root}')}"
    if (root / "val").is_dir() and any((root / "val").glob("ILSVRC2012_val_00000*")):
        return (
            "Of ImageNet as Kaggle has it, LOC_val_solution.csv has the labels of val/: cut -d' ' -f1 "
            "LOC_val_solution.csv > val.csv, then --val-split val.csv"
        )
    return ""


def _inside(root: Path) -> str:
    """A folder further in that holds train/."""
    if any(role(name) == "training" for name in folders(root)):
        return ""
    level = [root]
    for _ in range(2):
        level = [path / name for path in level for name in folders(path)][:100]
        for path in level:
            if any(role(name) == "training" and folders(path / name) for name in folders(path)):
                return f"'{path}' in it has a split to train on: --data {quote(str(path))}"
    return ""


def _labels(root: Path) -> str:
    """Files in it, or one folder further in, that may have the labels."""
    above = [root.absolute().parent] if role(root.name) else []  # Kaggle's train.csv stands beside train/
    inner = [root, *(root / name for name in folders(root)[:50]), *above]
    tables = [
        folder / name
        for folder in inner
        for name in _files(folder)
        if name.lower().endswith(ENDINGS) and "submission" not in name.lower()
    ]
    if not tables:
        return ""
    roles = {
        path: role(path.stem) or (role(path.parent.name) if path.parent.parent == root else None) for path in tables
    }
    validation = [path for path in tables if roles[path] == "validation"]
    if any(role(name) == "training" and folders(root / name) for name in folders(root)):
        named = f"--data {quote(str(root))} --val-split {quote(str((validation or tables)[0].absolute()))}"
    else:
        train = [path for path in tables if roles[path] == "training"] or tables
        second = [path for path in validation if path != train[0]]
        named = f"--data {quote(str(train[0]))}"
        named += f" --val-split {quote(str(second[0].absolute()))}" if second else ""
    return f"If the labels are in {listed(os.path.relpath(path, root) for path in tables)}: {named}"


def _by_name(root: Path) -> str:
    """Images whose names begin with their class, such as cat.0.jpg."""
    for folder in (root, *(root / name for name in folders(root) if role(name) == "training")):
        images = list(filter(is_image, _files(folder)))
        words = Counter(re.split("[._-]", name)[0] for name in images)
        if 2 <= len(words) <= len(images) / 2 and all(word.isalpha() for word in words):
            return (
                f"If names there begin with the class ({listed(words)}): (cd '{folder}' && for f in *.*; do "
                'mkdir -p "${f%%[._-]*}" && mv "$f" "${f%%[._-]*}/"; done)'
            )
    return ""


def _archives(root: Path) -> str:
    for endings, advice in ARCHIVES.items():
        for path in (root / name for name in _files(root) if name.lower().endswith(endings)):
            return f"'{path.name}' is not unpacked. " + advice.format(
                path=path, stem=root / path.name.partition(".")[0]
            )
    if arrays := [name for name in _files(root) if name.endswith(".npz")]:
        return f"If the images are in {listed(arrays)}: --data {quote(str(root / arrays[0]))}"
    return ""
