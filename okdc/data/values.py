"""What the parts of `okdc.data` share: the values they return."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

log = logging.getLogger("okdc")

BadImage = tuple[str, str, int]  # name, reason, class index
Counts = dict[str, dict[str, dict[str, int]]]  # split -> class -> {"images": N, "unreadable": those met so far}
Batch = tuple[Tensor, Tensor]
Label = int | list[float]  # the index of a class, or of each class whether it is there
TrainBatch = tuple[Tensor, ...]  # images (B, C, H, W) or (V, B, C, H, W), labels (B,) or (B, classes), perhaps more


class TrainBatches(Protocol):
    """Training batches of (images, labels); `len` is the number of steps per epoch."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[TrainBatch]:
        """The batches of `epoch` (0-based) from step `start` on: images (B, C, H, W), labels (B,) or (B, classes).

        With views the images are (V, B, C, H, W); with indices a third tensor (B,) int64 says which image each one is.
        Where the method takes mixed images, and they are, indices are (B, 2), and shares (B,) follow: `Needs.mixed`.
        """
        ...

    def __len__(self) -> int: ...


class RawTraining(Protocol):
    """(PIL image as stored, class index) by position; raises whatever reading the image raises."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> tuple[Image.Image, Label]: ...


@dataclass(frozen=True)
class Source:
    """A data set opened and checked, not yet batched; each split gives (PIL image, class index)."""

    train: Any
    validation: Any
    classes: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class Data:
    """Batches to train and to validate with.

    `validation` gives (images (B, C, H, W) float32, labels (B,) int64), every readable image once and in order;
    `validation_images` gives the same images raw, as (PIL image, class index), of key points ((image, box), points),
    or is None where only the user's own loader knows them. `preprocess` has the keys of timm's pretrained_cfg. `sizes`
    counts the training and the validation images. `bad_images` maps each image that this process could not read so far
    to the reason, and `image_counts` counts them beside all images, by split (`training`, with those set aside, and
    `validation`) and class; it is empty where images are not known one by one. `train_labels` (N,) are the classes of
    the training images, in the order of their indices, `held_out` gives the images that were set aside for the
    method, as `validation` does, and `training_images` are those that are trained on, raw, by position; each is None
    where it is not known. `test` gives the validation images where others, set aside (`holdout`), are the
    `validation`. `noted` is what the task must be told of the data (`tasks.get`).
    """

    train: TrainBatches
    validation: Iterable[Batch] | None
    validation_images: Iterable[tuple[Any, Any]] | None
    classes: tuple[str, ...]
    preprocess: dict[str, Any]
    name: str
    sizes: tuple[int, int]
    bad_images: dict[str, str]
    train_labels: Tensor | None = None
    held_out: Iterable[Batch] | None = None
    test: Iterable[Batch] | None = None
    training_images: RawTraining | None = None
    image_counts: Counts = field(default_factory=dict)
    noted: Mapping[str, Any] = field(default_factory=dict)

    def leave_device(self) -> None:
        """Keep decoded images on the CPU from now on; batches still come on the device."""
        for batches in (self.train, self.validation, self.held_out, self.test):
            if kept := getattr(batches, "kept", None):
                kept.leave_device()

    @property
    def unreadable(self) -> dict[str, dict[str, int]]:
        """How many images could not be read, by split and class, where there are some."""
        lost = {
            split: {name: each["unreadable"] for name, each in classes.items() if each["unreadable"]}
            for split, classes in self.image_counts.items()
        }
        return {split: classes for split, classes in lost.items() if classes}
