"""Batches of images that are read one by one: shuffled to train with, in order to validate with, and raw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from okdc.data.batchwise import Law
from okdc.data.images import Images
from okdc.data.readable import BadImages
from okdc.data.resident import Decoded, ResidentInOrder, ResidentTraining
from okdc.data.samples import EpochPlaces, OrderedPlaces, Part, TrainImages, ValidationImages, as_loaded
from okdc.data.transforms import MODES, BatchAugmentation, convert
from okdc.data.values import Batch, Label, TrainBatch
from okdc.errors import DataError
from okdc.needs import Needs
from okdc.system.signals import leave_signals


class CountedBatches:
    """The batches of a DataLoader, pinned for `device`, after the bad images that its workers met were counted here."""

    def __init__(self, loader: DataLoader, bad: BadImages, full: int | None, device: torch.device):
        self.loader, self.bad, self.full, self.device = loader, bad, full, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        # A DataLoader pins for the GPU that is current, and would take memory of that one.
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with current:
            batches = iter(self.loader)
        while True:
            with current:
                batch = next(batches, None)
            if batch is None:
                return
            images, targets, bad = batch
            for image in bad:
                self.bad.add(*image)
            if self.full and len(targets) < self.full:
                raise DataError(
                    f"none of the training images can be read, for example {bad[0][0]} ({bad[0][1]}). Check --data."
                )
            if len(targets):
                yield images, targets


def batch_loader(
    dataset: Dataset,
    order: Any,
    workers: int,
    config: dict[str, Any],
    bad: BadImages,
    device: torch.device,
    full: int | None = None,
) -> PrefetchLoader:
    """Batches that a data set loads whole, in this order, normalised on the device; `full`: images that each has."""
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=as_loaded,
        worker_init_fn=leave_signals,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # drawn from at each epoch, so it must not be the one that the network uses
    )
    counted: Any = CountedBatches(loader, bad, full, device)
    return PrefetchLoader(counted, config["mean"], config["std"], config["input_size"][0], device=device)


class ShuffledBatches:
    """Training batches; one pass at a time, because the worker processes stay from epoch to epoch."""

    def __init__(
        self,
        dataset: TrainImages,
        part: Part,
        workers: int,
        config: dict[str, Any],
        bad: BadImages,
        augmentation: BatchAugmentation,
        device: torch.device,
        needs: Needs,
        resident: tuple[Decoded, Law] | None = None,
    ):
        self.places, self.resident = EpochPlaces(len(dataset), part), resident is not None
        self.kept = resident[0] if resident else None
        self.labels = dataset.images.labels.to(device)
        self.loader: Any = (
            ResidentTraining(*resident, dataset, self.places, config, device)
            if resident
            else batch_loader(dataset, self.places, workers, config, bad, device, part.size)
        )
        self.augmentation, self.needs, self.views = augmentation, needs, len(dataset.transforms)

    def __len__(self) -> int:
        return len(self.places)

    def batches(self, epoch: int, start: int = 0) -> Iterator[TrainBatch]:
        """The batches of `epoch` (0-based) from step `start` on; skipping costs nothing."""
        self.places.epoch, self.places.start = epoch, start
        for step, (images, indices) in enumerate(self.loader, start):
            labels = self.labels[indices]
            if self.views > 1:
                images = images.unflatten(0, (self.views, -1))
            batch = self.augmentation(images, labels, epoch, step, self.places.places)
            if self.needs.mixed and self.augmentation.mixup:
                yield (*batch, *self.augmentation.mixed_of(indices, images, epoch, step))
            else:
                yield (*batch, indices) if self.needs.indices else batch


class OrderedBatches:
    """Validation batches: every readable image once, in order; or those in certain `places` of it."""

    def __init__(
        self,
        dataset: ValidationImages,
        batch_size: int,
        workers: int,
        config: dict[str, Any],
        bad: BadImages,
        device: torch.device,
        kept: Decoded | None = None,
        places: Sequence[int] | None = None,
    ):
        self.arguments = dataset, batch_size, workers, config, bad, device, kept
        places = range(len(dataset)) if places is None else places
        self.order, self.kept = OrderedPlaces(places, batch_size), kept
        self.truth = dataset.images.labels.to(device)
        self.loader: Any = (
            ResidentInOrder(kept, self.order, config, device)
            if kept
            else batch_loader(dataset, self.order, workers, config, bad, device)
        )

    def __len__(self) -> int:
        return len(self.order.batches)

    def __iter__(self) -> Iterator[Batch]:
        return self.every(0, 1)

    @property
    def labels(self) -> Tensor:
        """The kinds (images,) of all images, unreadable ones too."""
        return self.arguments[0].images.kinds

    def only(self, places: Sequence[int]) -> OrderedBatches:
        """Batches of the images in these places; the others are not read."""
        return OrderedBatches(*self.arguments, places)

    def every(self, first: int, step: int) -> Iterator[Batch]:
        """Each `step`-th batch from the `first` on; the others are not read."""
        self.order.first, self.order.every = first, step
        return ((images, self.truth[positions]) for images, positions in self.loader)


class RawImages:
    """(PIL image as stored, class index) of every readable validation image, in the order of the batches."""

    def __init__(self, images: Images, config: dict[str, Any], bad: BadImages, places: Sequence[int] | None = None):
        self.images, self.config, self.bad = images, config, bad
        self.places = range(len(images)) if places is None else places

    def files(self) -> list[str | None]:
        """The file of each image, readable or not; None where it has none."""
        return [self.images.file(position) for position in self.places]

    def only(self, places: Sequence[int]) -> RawImages:
        """The images in these places; the others are not read."""
        return RawImages(self.images, self.config, self.bad, places)

    def __iter__(self) -> Iterator[tuple[Image.Image, Label]]:
        for position in self.places:
            try:
                image, label = self.images[position]
                convert(
                    image, MODES[self.config["input_size"][0]], self.config.get("pixel_bits")
                )  # what cannot be converted is in no batch either
            except Exception as error:
                name, reason = self.images.name(position), f"{type(error).__name__}: {error}"
                self.bad.add(name, reason, int(self.images.kinds[position]))
            else:
                yield image, label
