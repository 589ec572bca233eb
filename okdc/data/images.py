"""One split of a data set that can be read image by image, and what must be true of it before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from okdc.data.names import check_lines, listed
from okdc.data.values import Label, Source, log
from okdc.errors import DataError
from okdc.tasks.shared.label_rows import rarest

PAGES = "several pages"  # in the info of an image of which the first one is read


class Images(Dataset):
    """(PIL image as stored, label) by position; raises whatever reading the image raises.

    Labels are class indices (N,), or rows (N, classes) of 0 and 1.
    """

    def __init__(self, dataset: Any, labels: Tensor, origin: str, indices: Tensor | None = None):
        self.dataset = dataset
        self.labels = labels
        self.origin = origin
        self.indices = torch.arange(len(labels)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Image.Image, Label]:
        index = int(self.indices[position])
        if hasattr(self.dataset, "reader"):
            # Not through timm's ImageDataset, which puts a neighbour in the place of an image that it cannot read.
            with self.dataset.reader[index][0] as file, Image.open(file) as image:
                image.load()
        else:
            image = self.dataset[index][0]
            image.load()  # torchvision's INaturalist leaves it, and its file, to whoever looks at it
        return image, self.labels[position].tolist()

    @property
    def kinds(self) -> Tensor:
        """What a split of the images has its share of (N,): their class, or of several the rarest (classes: none)."""
        return self.labels if self.labels.ndim == 1 else rarest(self.labels)

    def name(self, position: int) -> str:
        """The file of an image, or its number where it has no file of its own."""
        return self.file(position) or f"image {int(self.indices[position])} of {self.origin}"

    def file(self, position: int) -> str | None:
        """The file of an image, perhaps within an archive; None where it has none."""
        index = int(self.indices[position])
        return self.dataset.filename(index, absolute=True) if hasattr(self.dataset, "filename") else None

    def split(self, every: int) -> tuple[Images, Images]:
        """(training, validation): each `every`-th image of each class validates, the same ones on any machine.

        The only image of a class is for training.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        kinds = self.kinds
        order = order[kinds[order].argsort(stable=True)]
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[order[::every]] = True
        chosen &= kinds.bincount()[kinds] > 1
        return self._part(~chosen), self._part(chosen)

    def _part(self, mask: Tensor) -> Images:
        return Images(self.dataset, self.labels[mask], self.origin, self.indices[mask])


def labels_of(dataset: Any, given: str) -> Tensor:
    """The class index of each image, (N,) int64, without decoding images where the data set allows that."""
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "samples"):
        labels: Sequence[Any] = [label for _, label in reader.samples]
    elif hasattr(reader, "iter_targets"):
        labels = list(reader.iter_targets())
    elif hasattr(dataset, "index"):  # torchvision's INaturalist
        labels = [label for label, _ in dataset.index]
    else:
        labels = dataset.targets if hasattr(dataset, "targets") else [label for _, label in dataset]
    try:
        return torch.as_tensor(labels, dtype=torch.int64).reshape(len(dataset))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the labels of '{given}' are not one class index per image; the first is {labels[0]!r}. okdc trains "
            "classifiers with one label per image: choose another data set, or pass your own loader to "
            "okdc.compress()."
        ) from error


def names_by_index(class_to_idx: dict[Any, int]) -> tuple[str, ...]:
    """Class names in the order of their indices; an index without a name is named by its number."""
    names = {index: str(name) for name, index in class_to_idx.items()}
    return tuple(names.get(index, str(index)) for index in range(max(names) + 1))


def split_in_two(images: Images, classes: tuple[str, ...], name: str) -> Source:
    """Training and validation from a data set that has training images only: fixed, stratified, 90/10."""
    counts = count(images.labels.clamp(min=0), len(classes))
    if single := [cls for cls, count in zip(classes, counts) if count == 1]:
        raise DataError(
            f"{name} has no validation images, and only one image of class {listed(single)}, which cannot be split; "
            "expected two images or more of each class. Add images, or put a val/ folder beside train/ (to a table: "
            "--val-split FILE.csv)."
        )
    train, validation = images.split(10)
    log.info("%s has no validation images of its own: %d train, %d validate", name, len(train), len(validation))
    return Source(train, validation, classes, f"{name} (90/10 split)")


def count(labels: Tensor, classes: int) -> list[int]:
    """How many images each class has, by their labels (N,) or (N, classes)."""
    return (labels.bincount(minlength=classes) if labels.ndim == 1 else labels.sum(0).long()).tolist()


def check(source: Source) -> None:
    """Refuse, with a DataError, a source that cannot be trained on."""
    for split, images in (("training", source.train), ("validation", source.validation)):
        _check_labels(split, images, source)
    if len(source.classes) < 2:
        raise DataError(
            f"{source.name} has only one class ({source.classes[0]}); expected at least two. Put the images of each "
            "class into a folder of their own, for example train/cat and train/dog."
        )
    check_lines(source.classes, source.name)
    counts = count(source.train.labels, len(source.classes))
    if empty := [cls for cls, count in zip(source.classes, counts) if not count]:
        raise DataError(
            f"{source.name} has no training image of class {listed(empty)}; expected at least one image of each "
            "class. Add images, or take the class out of the data set or of the class map."
        )


def _check_labels(split: str, images: Images, source: Source) -> None:
    if not len(images):
        raise DataError(f"{source.name} has no {split} images. Check the folder, --train-split and --val-split.")
    if images.labels.ndim == 2:  # made of the names of the classes
        return
    low, high = int(images.labels.min()), int(images.labels.max())
    if low < 0 or high >= len(source.classes):
        raise DataError(
            f"the {split} labels of {source.name} run from {low} to {high}; expected 0 to {len(source.classes) - 1} "
            f"({len(source.classes)} classes). A split without labels often has -1: choose another with "
            "--train-split or --val-split."
        )
