"""Batches from a source whose images can be read one by one, in an order and with augmentation that keep no state."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from okdc.data._common import BadImages, Batch, Data, Source, borrowed_generators, derive_seed, reseed
from okdc.data._images import Images
from okdc.data._streams import Stream, load_stream
from okdc.data._transforms import MODES, BatchAugmentation, convert, image_transform, preprocessing
from okdc.errors import DataError
from okdc.settings import DataSettings

BadImage = tuple[str, str]  # name, reason
Loaded = tuple[Tensor, Tensor, list[BadImage]]


def load(
    source: Source,
    settings: DataSettings,
    config: dict[str, Any],
    *,
    batch_size: int,
    validation_batch_size: int | None,
    seed: int,
    device: torch.device | str,
) -> Data:
    """Batch a source for a network whose `config` has timm's input_size, mean, std, interpolation, crop_pct, crop_mode.

    Batches are normalised float32 on `device`. Raises DataError when there are fewer training images than one batch,
    and, later, when more than `settings.max_bad_images` images cannot be read.
    """
    device = torch.device(device)
    config = preprocessing(settings, config)
    if batch_size < 1:
        raise DataError(f"the batch size is {batch_size}; expected 1 or more: -b 128")
    bad = BadImages(settings.max_bad_images)
    augmentation = BatchAugmentation(settings, len(source.classes), seed, device)
    validation_batch_size = validation_batch_size or batch_size
    if isinstance(source.train, Stream):
        return load_stream(source, settings, config, batch_size, validation_batch_size, seed, augmentation, device)
    if len(source.train) < batch_size:
        raise DataError(
            f"{source.name} has {len(source.train)} training images, fewer than one batch of {batch_size}; expected "
            f"a batch that they fill: -b {min(len(source.train), 32)}"
        )
    attempts = min(settings.max_bad_images + 1, len(source.train))
    train = TrainImages(source.train, image_transform(settings, config, True), config, attempts, seed)
    validation = ValidationImages(source.validation, image_transform(settings, config, False), config)
    return Data(
        train=ShuffledBatches(train, batch_size, settings.workers, config, bad, augmentation, device),
        validation=OrderedBatches(validation, validation_batch_size, settings.workers, config, bad, device),
        validation_images=RawImages(source.validation, bad),
        classes=source.classes,
        preprocess=config,
        name=source.name,
        sizes=(len(source.train), len(source.validation)),
        bad_images=bad.reasons,
    )


def _read(images: Images, position: int, mode: str, bad: list[BadImage]) -> tuple[Image.Image, int] | None:
    try:
        image, label = images[position]
        return convert(image, mode), label
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        bad.append((images.name(position), f"{type(error).__name__}: {error}"))
        return None


def _collate(samples: list[tuple[Tensor, int]], bad: list[BadImage]) -> Loaded:
    if not samples:
        return torch.empty(0), torch.empty(0, dtype=torch.int64), bad
    return *fast_collate(samples), bad


class TrainImages(Dataset):
    """Loads whole batches by (epoch, position in the epoch's permutation).

    An unreadable image gives its place to the next readable one of the permutation; after `attempts` in a row its place
    stays empty, which whoever counts the bad images turns into an error.
    """

    def __init__(self, images: Images, transform: Any, config: dict[str, Any], attempts: int, seed: int):
        self.images, self.transform, self.mode = images, transform, MODES[config["input_size"][0]]
        self.attempts, self.seed = attempts, seed
        self.epoch, self.permutation = -1, torch.empty(0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, places: list[tuple[int, int]]) -> Loaded:
        bad: list[BadImage] = []
        with borrowed_generators(self.seed):
            samples = [self._sample(epoch, position, bad) for epoch, position in places]
        return _collate([sample for sample in samples if sample is not None], bad)

    def _sample(self, epoch: int, position: int, bad: list[BadImage]) -> tuple[Tensor, int] | None:
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
            self.epoch, self.permutation = epoch, torch.randperm(len(self), generator=generator)
        for attempt in range(self.attempts):
            index = int(self.permutation[(position + attempt) % len(self)])
            if sample := _read(self.images, index, self.mode, bad):
                # The place's own image seeds, so that a stand-in is not cropped as it is in its own place.
                reseed(self.seed, epoch, int(self.permutation[position]), 2)
                return self.transform(sample[0]), sample[1]
        return None


class ValidationImages(Dataset):
    """Loads whole batches by position; an unreadable image is left out."""

    def __init__(self, images: Images, transform: Any, config: dict[str, Any]):
        self.images, self.transform, self.mode = images, transform, MODES[config["input_size"][0]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, positions: list[int]) -> Loaded:
        bad: list[BadImage] = []
        samples = [_read(self.images, position, self.mode, bad) for position in positions]
        return _collate([(self.transform(sample[0]), sample[1]) for sample in samples if sample], bad)


class EpochOrder(Sampler):
    """Batches of (epoch, position), from batch `start` of the epoch on: what is skipped is never read."""

    def __init__(self, num_images: int, batch_size: int):
        self.batch_size, self.steps = batch_size, num_images // batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            yield [(self.epoch, step * self.batch_size + place) for place in range(self.batch_size)]


class CountedBatches:
    """The batches of a DataLoader, after the bad images that its workers met have been counted here."""

    def __init__(self, loader: DataLoader, bad: BadImages, full: int | None):
        self.loader, self.bad, self.full = loader, bad, full

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for images, labels, bad in self.loader:
            for name, reason in bad:
                self.bad.add(name, reason)
            if self.full and len(labels) < self.full:
                raise DataError(
                    f"none of the training images can be read, for example {bad[0][0]} ({bad[0][1]}). Check --data."
                )
            if len(labels):
                yield images, labels


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
        collate_fn=_as_loaded,
        worker_init_fn=_leave_interrupts_to_the_main_process,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # drawn from at each epoch, so it must not be the one that the network uses
    )
    counted: Any = CountedBatches(loader, bad, full)
    return PrefetchLoader(counted, config["mean"], config["std"], config["input_size"][0], device=device)


def _as_loaded(batch: Any) -> Any:
    return batch


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class ShuffledBatches:
    """Training batches; one pass at a time, because the worker processes stay from epoch to epoch."""

    def __init__(
        self,
        dataset: TrainImages,
        batch_size: int,
        workers: int,
        config: dict[str, Any],
        bad: BadImages,
        augmentation: BatchAugmentation,
        device: torch.device,
    ):
        self.order = EpochOrder(len(dataset), batch_size)
        self.loader = _loader(dataset, self.order, workers, config, bad, device, batch_size)
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (0-based) from step `start` on; skipping costs nothing."""
        self.order.epoch, self.order.start = epoch, start
        for step, (images, labels) in enumerate(self.loader, start):
            yield self.augmentation(images, labels, epoch, step)


class OrderedBatches:
    """Validation batches: every readable image once, in order."""

    def __init__(
        self,
        dataset: ValidationImages,
        batch_size: int,
        workers: int,
        config: dict[str, Any],
        bad: BadImages,
        device: torch.device,
    ):
        order = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
        self.loader = _loader(dataset, order, workers, config, bad, device)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)


class RawImages:
    """(PIL image as stored, class index) of every readable validation image, in the order of the batches."""

    def __init__(self, images: Images, bad: BadImages):
        self.images, self.bad = images, bad

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for position in range(len(self.images)):
            try:
                image, label = self.images[position]
            except Exception as error:
                self.bad.add(self.images.name(position), f"{type(error).__name__}: {error}")
            else:
                yield image, label
