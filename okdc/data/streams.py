"""Data sets that can only be read from front to back: `wds/PATH`, `hfids/ID`, `tfds/NAME`, by timm's readers.

A stream has no permutation to jump into. An epoch is f(seed, epoch, number of workers of all ranks), because its
workers are started and seeded anew; what a resumed run skips is read, and not decoded (`stream_reading`). What a reader
does about samples that it cannot make out (webdataset logs and skips them) is its own affair: here they are neither
named nor counted. Images of tfds come decoded, without the EXIF data that says which side is up.

Shards are seldom of one length, and ranks must take as many steps each. So every worker gives as many batches as the
others, the images of an epoch divided by the workers and rounded up: one whose shards end begins them again, and one
that has more leaves the rest of them, others in each epoch, as timm's readers and webdataset's with_epoch do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data.loader import PrefetchLoader
from timm.data.readers.class_map import load_class_map
from torch.utils.data import DataLoader
from torchvision import transforms

from okdc.data.images import names_by_index
from okdc.data.names import check_lines
from okdc.data.samples import Part
from okdc.data.stream_reading import StreamReading, shards
from okdc.data.transforms import MODES, BatchAugmentation, image_transform, upright
from okdc.data.values import Batch, Data, Source, log
from okdc.errors import DataError
from okdc.recipe import DataSettings
from okdc.system.randomness import iterate_seeded
from okdc.system.waiting import worker_died


@dataclass(frozen=True)
class Stream:
    """A split that is opened anew for each reader, because timm's stream readers are told the batch size at birth."""

    open: Callable[[int], Any]


def stream_classes(stream: Stream, settings: DataSettings) -> tuple[str, ...]:
    """Class names, from the class map or from the stream itself; raises DataError when neither names them."""
    try:
        names = load_class_map(settings.class_map) if settings.class_map else stream.open(1).reader.class_to_idx
    except (AssertionError, OSError, ValueError) as error:
        raise DataError(f"cannot read the class map '{settings.class_map}' ({error}): --class-map FILE.txt") from error
    if not names:
        raise DataError(
            f"'{settings.data}' does not say what its classes are; expected a text file with one class name per "
            "line, in the order of their indices: --class-map FILE.txt"
        )
    check_lines(names, settings.data)
    return names_by_index(names)


def load_stream(
    source: Source,
    settings: DataSettings,
    config: dict[str, Any],
    part: Part,
    validation_batch_size: int,
    seed: int,
    augmentation: BatchAugmentation,
    device: torch.device,
) -> Data:
    """Batch a stream, a rank's part of it; raises DataError when it has too few training images, or too few shards."""
    train = StreamBatches(source.train, settings, config, part, seed, augmentation, device)
    if not len(train):
        raise DataError(
            f"{source.name} has fewer training images than one batch of {part.size}; expected a batch they fill: -b 8"
        )
    _check_shards(train.reading, source.name)
    validation = None
    if source.validation is not None:
        validation = StreamValidation(source.validation, settings, config, validation_batch_size, device)
    return Data(
        train=train,
        validation=validation,
        validation_images=None if validation is None else StreamImages(source.validation),
        classes=source.classes,
        preprocess=config,
        name=source.name,
        sizes=(len(train.reading.dataset), len(validation.reading.dataset) if validation else 0),
        bad_images={},
    )


def _check_shards(reading: StreamReading, name: str) -> None:
    """DataError for a worker without a shard, which would end every epoch early; a warning where some have more."""
    count, workers = shards(reading.dataset), reading.workers * reading.world
    of = f" of {reading.world} processes" if reading.world > 1 else ""
    if count is None or count % workers == 0:
        return
    if count < workers:
        most = count // reading.world
        way_out = f"-j {most}" if most else f"--devices {count} -j 1, or smaller shards"
        raise DataError(f"{name} has fewer training shards, {count}, than there are workers{of}, {workers}: {way_out}")
    log.warning(
        "%s: the %d workers%s cannot divide %d training shards evenly. Each gives as many batches as the others, so "
        "that in an epoch some images come twice and others not at all, others each time.", name, workers, of, count,
    )  # fmt: skip


def _transform(settings: DataSettings, config: dict[str, Any], training: bool) -> Any:
    transform = image_transform(settings, config, training)
    return transforms.Compose([upright, transform]) if config.get("exif") else transform


def _loader(reading: StreamReading, config: dict[str, Any], device: torch.device) -> PrefetchLoader:
    loader: DataLoader = DataLoader(
        reading,
        batch_size=None,
        num_workers=reading.workers,
        worker_init_fn=reading.begin,
        # Workers do not outlive an epoch: a reader that has been read from goes on with the random numbers it has left.
        persistent_workers=False,
        generator=torch.Generator(),
    )
    return PrefetchLoader(loader, config["mean"], config["std"], config["input_size"][0], device=device)


def _read(loader: Any, *key: int) -> Iterator[Batch]:
    try:
        yield from iterate_seeded(loader, *key)
    except RuntimeError as error:
        if worker_died(error):
            raise
        raise DataError(
            f"the data stream broke off: {str(error).strip().splitlines()[-1]} If it has fewer shards than there are "
            "workers, use fewer: -j 1"
        ) from error


class StreamBatches:
    """Training batches of a stream, those of one rank; batches that are skipped are read and not decoded."""

    def __init__(
        self,
        stream: Stream,
        settings: DataSettings,
        config: dict[str, Any],
        part: Part,
        seed: int,
        augmentation: BatchAugmentation,
        device: torch.device,
    ):
        transform, mode = _transform(settings, config, True), MODES[config["input_size"][0]]
        self.reading = StreamReading(
            stream.open(part.size), transform, mode, part.size,
            workers=max(1, settings.workers), rank=part.rank, world=part.world, seed=seed, full=True,
        )  # fmt: skip
        self.reading.dataset.set_loader_cfg(num_workers=self.reading.workers * part.world)
        self.part, self.seed, self.augmentation = part, seed, augmentation
        self.loader = _loader(self.reading, config, device)

    def __len__(self) -> int:
        return len(self.reading.dataset) // self.part.whole

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (0-based) from step `start` on."""
        self.reading.dataset.set_epoch(epoch)
        self.reading.epoch, self.reading.start = epoch, start
        for step, (images, labels) in enumerate(_read(self.loader, self.seed, epoch), start):
            yield self.augmentation(images, labels, epoch, step * self.part.world + self.part.rank)


class StreamValidation:
    """Validation batches of a stream, in its own order, which is kept by reading with one worker only."""

    def __init__(
        self, stream: Stream, settings: DataSettings, config: dict[str, Any], batch_size: int, device: torch.device
    ):
        transform, mode = _transform(settings, config, False), MODES[config["input_size"][0]]
        self.reading = StreamReading(stream.open(batch_size), transform, mode, batch_size)
        self.loader = _loader(self.reading, config, device)

    def __len__(self) -> int:
        return -(-len(self.reading.dataset) // self.reading.size)

    def __iter__(self) -> Iterator[Batch]:
        return self.every(0, 1)

    def every(self, first: int, step: int) -> Iterator[Batch]:
        """Each `step`-th batch from the `first` on; the others are read and not decoded."""
        self.reading.first, self.reading.every = first, step
        return _read(self.loader, 0)


class StreamImages:
    """(PIL image, class index) of a validation stream, in the order of the batches."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return iter(self.stream.open(1))
