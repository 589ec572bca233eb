"""Batches from a source whose images can be read one by one, in an order and with augmentation that keep no state."""

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
from okdc.data.names import listed
from okdc.data.pixel_bits import find_bits
from okdc.data.readable import BadImages, check_readable
from okdc.data.resident import Decoded, ResidentInOrder, ResidentTraining, keep, law
from okdc.data.samples import EpochPlaces, Order, OrderedPlaces, Part, TrainImages, ValidationImages, as_loaded
from okdc.data.streams import Stream, load_stream
from okdc.data.transforms import MODES, BatchAugmentation, convert, image_transform, preprocessing
from okdc.data.values import Batch, Data, Source, TrainBatch, log
from okdc.errors import DataError
from okdc.needs import NOTHING, Needs
from okdc.recipe import DataSettings
from okdc.system.signals import leave_signals

HELD_OUT = 20  # each how-manieth image of a class is set aside where a method needs some


def load(
    source: Source,
    settings: DataSettings,
    config: dict[str, Any],
    *,
    batch_size: int,
    validation_batch_size: int | None,
    seed: int,
    device: torch.device | str,
    needs: Needs = NOTHING,
    views: int = 1,
    rank: int = 0,
    world: int = 1,
    timeout: float = 0.0,
) -> Data:
    """Batch a source for a network whose `config` has timm's input_size, mean, std, interpolation, crop_pct, crop_mode.

    Batches are normalised float32 on `device`, with `views` of each image, and meet the method's `needs`. Where `world`
    processes train together, each has `batch_size` images of one larger batch, and this one is the `rank`-th. Raises
    DataError when they cannot, when there are fewer training images than one batch, when a class has no image that can
    be read, and, later, when too many images cannot be; also when those that are looked at do not come for `timeout`
    seconds (0: never).
    """
    device = torch.device(device)
    config = preprocessing(settings, config)
    if batch_size < 1:
        raise DataError(f"the batch size is {batch_size}; expected 1 or more: -b 128")
    augmentation = BatchAugmentation(settings, len(source.classes), seed, device)
    part = Part(batch_size, rank, world, mirrored=augmentation.mixup is not None)
    validation_batch_size = validation_batch_size or batch_size
    _refuse_blends(settings, needs)
    if isinstance(source.train, Stream):
        _refuse_stream(settings, needs, world)
        return load_stream(source, settings, config, batch_size, validation_batch_size, seed, augmentation, device)
    images, held_out = source.train.split(HELD_OUT) if needs.held_out else (source.train, None)
    _check_fills(part, len(images), source.name)
    if "pixel_bits" not in config and (bits := find_bits(source.train, timeout)):
        config["pixel_bits"] = bits
    order = Order(images.labels, seed, part.whole if needs.pairs else None)
    if needs.pairs and (alone := (images.labels.bincount() == 1).nonzero().flatten().tolist()):
        log.warning("only one training image, so no pair: class %s", listed(source.classes[i] for i in alone))
    attempts = min(settings.max_bad_images + 1, len(images))
    train = TrainImages(images, order, image_transform(settings, config, True), config, attempts, seed, views)

    reasons: dict[str, str] = {}
    bad, validation_bad = (
        BadImages(settings.max_bad_images, split, source.classes, whole.labels, reasons)
        for split, whole in (("training", source.train), ("validation", source.validation))
    )

    def in_order(these: Images, bad: BadImages) -> OrderedBatches:
        dataset = ValidationImages(these, image_transform(settings, config, False), config)
        kept = keep(these, settings, config, False, bad, device, timeout)
        return OrderedBatches(dataset, validation_batch_size, settings.workers, config, bad, device, kept)

    resident = None
    if kept := keep(images, settings, config, True, bad, device, timeout):
        resident = kept, law(settings, config)
    else:
        check_readable(images, bad, config, timeout)
    validation = in_order(source.validation, validation_bad)
    if not validation.kept:
        check_readable(source.validation, validation_bad, config, timeout)
    return Data(
        train=ShuffledBatches(train, part, settings.workers, config, bad, augmentation, device, needs, resident),
        validation=validation,
        validation_images=RawImages(source.validation, config, validation_bad),
        classes=source.classes,
        preprocess=config,
        name=source.name,
        sizes=(len(images), len(source.validation)),
        bad_images=reasons,
        train_labels=images.labels,
        held_out=in_order(held_out, bad) if held_out else None,
        training_images=images,
        image_counts={each.split: each.counts for each in (bad, validation_bad)},
    )


def _check_fills(part: Part, images: int, name: str) -> None:
    if images < part.whole:
        devices = f" on each of {part.world} devices" if part.world > 1 else ""
        raise DataError(
            f"{name} has {images} training images, fewer than one batch of {part.size}{devices}; expected a batch that "
            f"they fill: -b {max(1, min(images // part.world, 32))}"
        )


def _refuse_blends(settings: DataSettings, needs: Needs) -> None:
    if (needs.pairs or needs.indices) and (settings.mixup or settings.cutmix):
        raise DataError(
            "the method compares images of one class with images of others, and --mixup and --cutmix make images "
            "that are of two classes. Leave them out, or choose another --method."
        )


def _refuse_stream(settings: DataSettings, needs: Needs, world: int) -> None:
    if world > 1:
        raise DataError(
            f"{settings.data} is a stream, which is only read from front to back, and cannot be divided evenly among "
            f"{world} devices. Unpack it to a folder with train/ and val/, or use --devices 1."
        )
    asked = {
        "an augmentation of its own for each member": needs.views, "images of one class together": needs.pairs,
        "to know which image is which": needs.indices, "images set aside": needs.held_out,
    }  # fmt: skip
    if wanted := [words for words, needed in asked.items() if needed]:
        raise DataError(
            f"the method needs {' and '.join(wanted)}, and {settings.data} is a stream, which is only read from front "
            "to back. Unpack it to a folder with train/ and val/, or choose another --method (okdc methods)."
        )


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


def _loader(
    dataset: Dataset,
    order: Any,
    workers: int,
    config: dict[str, Any],
    bad: BadImages,
    device: torch.device,
    full: int | None = None,
) -> PrefetchLoader:
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
        self.loader: Any = (
            ResidentTraining(*resident, dataset, self.places, config, device)
            if resident
            else _loader(dataset, self.places, workers, config, bad, device, part.size)
        )
        self.augmentation, self.needs, self.views = augmentation, needs, dataset.views

    def __len__(self) -> int:
        return len(self.places)

    def batches(self, epoch: int, start: int = 0) -> Iterator[TrainBatch]:
        """The batches of `epoch` (0-based) from step `start` on; skipping costs nothing."""
        self.places.epoch, self.places.start = epoch, start
        for step, (images, targets) in enumerate(self.loader, start):
            labels, indices = targets.unbind(1)
            if self.views > 1:
                images = images.unflatten(0, (self.views, -1))
            batch = self.augmentation(images, labels, epoch, step, self.places.places)
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
        self.order, self.kept = OrderedPlaces(places, batch_size), kept is not None
        self.loader: Any = (
            ResidentInOrder(kept, dataset.images.labels, self.order, config, device)
            if kept
            else _loader(dataset, self.order, workers, config, bad, device)
        )

    def __len__(self) -> int:
        return len(self.order.batches)

    def __iter__(self) -> Iterator[Batch]:
        return self.every(0, 1)

    @property
    def labels(self) -> Tensor:
        """The classes (images,) of all images, unreadable ones too."""
        return self.arguments[0].images.labels

    def only(self, places: Sequence[int]) -> OrderedBatches:
        """Batches of the images in these places; the others are not read."""
        return OrderedBatches(*self.arguments, places)

    def every(self, first: int, step: int) -> Iterator[Batch]:
        """Each `step`-th batch from the `first` on; the others are not read."""
        self.order.first, self.order.every = first, step
        return iter(self.loader)


class RawImages:
    """(PIL image as stored, class index) of every readable validation image, in the order of the batches."""

    def __init__(self, images: Images, config: dict[str, Any], bad: BadImages, places: Sequence[int] | None = None):
        self.images, self.config, self.bad = images, config, bad
        self.places = range(len(images)) if places is None else places

    def only(self, places: Sequence[int]) -> RawImages:
        """The images in these places; the others are not read."""
        return RawImages(self.images, self.config, self.bad, places)

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for position in self.places:
            try:
                image, label = self.images[position]
                convert(
                    image, MODES[self.config["input_size"][0]], self.config.get("pixel_bits")
                )  # what cannot be converted is in no batch either
            except Exception as error:
                name, reason = self.images.name(position), f"{type(error).__name__}: {error}"
                self.bad.add(name, reason, int(self.images.labels[position]))
            else:
                yield image, label
