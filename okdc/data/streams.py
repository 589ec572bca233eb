"""Data sets that can only be read from front to back: `wds/PATH`, `hfids/ID`, `tfds/NAME`, by timm's create_loader.

A stream has no permutation to jump into. An epoch is still f(seed, epoch, number of workers), because its workers are
started and seeded anew, but skipping batches means reading them, so a resumed run is exact and quick at the start of an
epoch only; and what a reader does about unreadable images (webdataset logs and skips them) is its own affair: here they
are neither named nor counted. Images of tfds come decoded, without the EXIF data that says which side is up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_loader
from timm.data.readers.class_map import load_class_map
from torchvision import transforms

from okdc.data.images import names_by_index
from okdc.data.names import check_lines
from okdc.data.transforms import MODES, BatchAugmentation, image_transform, upright
from okdc.data.values import Batch, Data, Source
from okdc.errors import DataError
from okdc.recipe import DataSettings
from okdc.system.randomness import iterate_seeded
from okdc.system.signals import leave_signals
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
    batch_size: int,
    validation_batch_size: int,
    seed: int,
    augmentation: BatchAugmentation,
    device: torch.device,
) -> Data:
    """Batch a stream; raises DataError when it has fewer training images than one batch."""
    train = StreamBatches(source.train, settings, config, batch_size, seed, augmentation, device)
    if not len(train):
        raise DataError(
            f"{source.name} has fewer training images than one batch of {batch_size}; expected a batch they fill: -b 8"
        )
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
        sizes=(len(train.dataset), len(validation.dataset) if validation else 0),
        bad_images={},
    )


def _loader(dataset: Any, settings: DataSettings, config: dict[str, Any], training: bool, **options: Any) -> Any:
    dataset.reader.input_img_mode = MODES[config["input_size"][0]]
    # Workers do not outlive an epoch: a reader that has been read from goes on with the random numbers it has left.
    options |= {"is_training": training, "persistent_workers": False, "worker_seeding": _begin_worker}
    options |= {"mean": config["mean"], "std": config["std"]}
    loader = create_loader(dataset, config["input_size"], **options)
    transform = image_transform(settings, config, training)
    dataset.transform = transforms.Compose([upright, transform]) if config.get("exif") else transform
    return loader


def _begin_worker(info: Any) -> int:
    leave_signals(info.id)
    return info.seed  # timm's own choice


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
    """Training batches of a stream; skipped batches are read and thrown away."""

    def __init__(
        self,
        stream: Stream,
        settings: DataSettings,
        config: dict[str, Any],
        batch_size: int,
        seed: int,
        augmentation: BatchAugmentation,
        device: torch.device,
    ):
        self.dataset = stream.open(batch_size)
        self.seed, self.augmentation = seed, augmentation
        options = {"batch_size": batch_size, "num_workers": max(1, settings.workers), "device": device}
        self.loader = _loader(self.dataset, settings, config, True, **options)

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (0-based) from step `start` on."""
        self.dataset.set_epoch(epoch)
        for step, (images, labels) in enumerate(_read(self.loader, self.seed, epoch)):
            if step >= start:
                yield self.augmentation(images, labels, epoch, step)


class StreamValidation:
    """Validation batches of a stream, in its own order, which is kept by reading with one worker only."""

    def __init__(
        self, stream: Stream, settings: DataSettings, config: dict[str, Any], batch_size: int, device: torch.device
    ):
        self.dataset = stream.open(batch_size)
        options = {"batch_size": batch_size, "num_workers": 1, "device": device}
        self.loader = _loader(self.dataset, settings, config, False, **options)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return _read(self.loader, 0)


class StreamImages:
    """(PIL image, class index) of a validation stream, in the order of the batches."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return iter(self.stream.open(1))
