"""Batches of images with key points: each cropped and augmented by one affine map, which its points go through, too.

Labels are (B, K, 7): x, y in pixels of the input, a weight, and where the image came from (tasks.shared.point_labels).
The order is f(seed, epoch), the change of an image f(seed, epoch, image), whatever the number of worker processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from okdc.data.affine import Augmentation, Box, Change, draw, view
from okdc.data.batches import batch_loader
from okdc.data.poses import Meta, PoseSource
from okdc.data.readable import BadImages
from okdc.data.samples import EpochPlaces, Loaded, Order, OrderedPlaces, Part
from okdc.data.transforms import MODES, convert, preprocessing
from okdc.data.values import BadImage, Batch, Data
from okdc.errors import DataError, counted
from okdc.recipe import DataSettings

KIND = "labelled"  # the one kind of image that there is, where unreadable ones are counted by kind


def load_poses(
    source: PoseSource,
    settings: DataSettings,
    config: dict[str, Any],
    *,
    batch_size: int,
    validation_batch_size: int,
    seed: int,
    device: torch.device,
    part: Part,
) -> Data:
    """Batch key points as `okdc.data.load` does images; DataError where a mirror needs pairs that nobody said."""
    config = preprocessing(settings, config)
    augmentation = augmentation_of(settings, source)
    reasons: dict[str, str] = {}
    bad, validation_bad = (
        BadImages(settings.max_bad_images, split, (KIND,), torch.zeros(len(each), dtype=torch.int64), reasons)
        for split, each in (("training", source.train), ("validation", source.validation))
    )
    if len(source.train) < part.whole:
        raise DataError(
            f"{source.name} has {counted(len(source.train), 'training image')}, fewer than one batch of {part.size}; "
            f"expected a batch that they fill: -b {max(1, min(len(source.train) // part.world, 32))}"
        )
    attempts = min(settings.max_bad_images + 1, len(source.train))
    train, plain = TrainPoses(source, augmentation, config, attempts, seed), PlainPoses(source, source.train, config)
    return Data(
        train=ShuffledPoses(train, plain, part, settings.workers, config, bad, device),
        validation=OrderedPoses(source, validation_batch_size, settings.workers, config, validation_bad, device),
        validation_images=RawPoses(PlainPoses(source, source.validation, config)),
        classes=source.classes,
        preprocess=config,
        name=source.name,
        sizes=(len(source.train), len(source.validation)),
        bad_images=reasons,
        image_counts={each.split: each.counts for each in (bad, validation_bad)},
        noted=source.noted,
    )


def augmentation_of(settings: DataSettings, source: PoseSource) -> Augmentation:
    """What the settings say; DataError where images would be mirrored and nobody said which points change places."""
    if settings.no_aug:
        return Augmentation(0, 0, 0, 0, 0)
    source.check_flips(settings.hflip)
    return Augmentation(settings.rotation, scale=settings.zoom, shift=settings.shift, hflip=settings.hflip)


class Reader:
    """Reads instances of one split as the network takes them."""

    def __init__(self, source: PoseSource, poses: Any, config: dict[str, Any]) -> None:
        self.poses, self.config = poses, config
        self.order = source.skeleton.mirrored()
        self.margin = source.margin
        self.pictures = {name: i for i, name in enumerate(dict.fromkeys(map(poses.name, range(len(poses)))))}

    def read(self, position: int, bad: list[BadImage]) -> tuple[Image.Image, Tensor, Meta] | None:
        """An instance, its image in the network's colours; None where that cannot be read, which `bad` is told."""
        try:
            image, points, meta = self.poses[position]
            return convert(image, MODES[self.config["input_size"][0]], self.config.get("pixel_bits")), points, meta
        except Exception as error:  # Pillow's decoders raise nearly anything on broken files
            bad.append((self.poses.name(position), f"{type(error).__name__}: {error}", 0))
            return None

    def seen(self, image: Image.Image, points: Tensor, meta: Meta, change: Change | None) -> tuple[Tensor, Tensor]:
        """Pixels (C, H, W) uint8 and labels (K, 7) of an instance."""
        size = self.config["input_size"][1:]
        crop, there, matrix = view(image, points, meta.box, size, margin=self.margin, change=change, order=self.order)
        pixels = np.asarray(crop).reshape(*size, -1).transpose(2, 0, 1).copy()
        scale = 1 / math.sqrt(abs(float(torch.linalg.det(matrix[:, :2]))))
        origin = torch.tensor([scale, meta.length, meta.area, self.pictures[meta.file]], dtype=torch.float32)
        return torch.from_numpy(pixels), torch.cat([there.float(), origin.expand(len(there), -1)], 1)


class TrainPoses(Dataset):
    """Loads whole batches by (epoch, position in its order); what cannot be read gives its place to the next."""

    def __init__(
        self, source: PoseSource, augmentation: Augmentation, config: dict[str, Any], attempts: int, seed: int
    ) -> None:
        self.reader, self.augmentation = Reader(source, source.train, config), augmentation
        self.attempts, self.seed = attempts, seed
        self.order = Order(torch.zeros(len(source.train), dtype=torch.int64), seed)
        self.epoch, self.positions = -1, torch.empty(0)

    def __len__(self) -> int:
        return len(self.reader.poses)

    def __getitems__(self, places: list[tuple[int, int]]) -> Loaded:
        bad: list[BadImage] = []
        samples = [self._sample(epoch, place, bad) for epoch, place in places]
        return _collated([sample for sample in samples if sample is not None], bad)

    def _sample(self, epoch: int, place: int, bad: list[BadImage]) -> tuple[Tensor, Tensor] | None:
        if epoch != self.epoch:
            self.epoch, self.positions = epoch, self.order.of(epoch)
        for position in islice(self.order.candidates(self.positions, place), self.attempts):
            if (found := self.reader.read(position, bad)) is not None:
                return self.reader.seen(*found, draw(self.augmentation, self.seed, epoch, position))
        return None


class PlainPoses(Dataset):
    """Loads whole batches of a split by position, without a change; an unreadable image is left out."""

    def __init__(self, source: PoseSource, poses: Any, config: dict[str, Any]) -> None:
        self.reader = Reader(source, poses, config)

    def __len__(self) -> int:
        return len(self.reader.poses)

    def __getitems__(self, positions: list[int]) -> Loaded:
        bad: list[BadImage] = []
        found = [self.reader.read(position, bad) for position in positions]
        return _collated([self.reader.seen(*each, None) for each in found if each is not None], bad)


def _collated(samples: list[tuple[Tensor, Tensor]], bad: list[BadImage]) -> Loaded:
    if not samples:
        return torch.empty(0), torch.empty(0), bad
    images, labels = zip(*samples)
    return torch.stack(images), torch.stack(labels), bad


class RawPoses:
    """((PIL image, its box), labels (K, 7)) of the validation images that can be read, in the order of the batches.

    `places` are those of some of them. What predict.py finds in a box is held against what the network finds there.
    """

    def __init__(self, dataset: PlainPoses, places: Sequence[int] | None = None) -> None:
        self.dataset, self.places = dataset, range(len(dataset)) if places is None else places

    def only(self, places: Sequence[int]) -> RawPoses:
        """The images in these places; the others are not read."""
        return RawPoses(self.dataset, places)

    def __iter__(self) -> Iterator[tuple[tuple[Image.Image, Box], list[list[float]]]]:
        for position in self.places:
            if (found := self.dataset.reader.read(position, [])) is not None:
                yield (found[0], found[2].box), self.dataset.reader.seen(*found, None)[1].tolist()


class ShuffledPoses:
    """Training batches."""

    def __init__(
        self,
        dataset: TrainPoses,
        plain: PlainPoses,
        part: Part,
        workers: int,
        config: dict[str, Any],
        bad: BadImages,
        device: torch.device,
    ) -> None:
        self.plain_arguments = plain, config, bad
        self.places = EpochPlaces(len(dataset), part)
        self.loader = batch_loader(dataset, self.places, workers, config, bad, device, part.size)

    def __len__(self) -> int:
        return len(self.places)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (0-based) from step `start` on; skipping costs nothing."""
        self.places.epoch, self.places.start = epoch, start
        yield from self.loader

    def plain(self, places: Sequence[int]) -> Iterator[Batch]:
        """The training images in these places as a network is judged on them, on the CPU."""
        dataset, config, bad = self.plain_arguments
        yield from batch_loader(dataset, OrderedPlaces(places, 64), 0, config, bad, torch.device("cpu"))


class OrderedPoses:
    """Validation batches: every readable image once, in order; or those in certain `places` of it."""

    def __init__(
        self,
        source: PoseSource,
        batch_size: int,
        workers: int,
        config: dict[str, Any],
        bad: BadImages,
        device: torch.device,
        places: Sequence[int] | None = None,
    ) -> None:
        self.arguments = source, batch_size, workers, config, bad, device
        dataset = PlainPoses(source, source.validation, config)
        self.order = OrderedPlaces(range(len(dataset)) if places is None else places, batch_size)
        self.loader = batch_loader(dataset, self.order, workers, config, bad, device)

    def __len__(self) -> int:
        return len(self.order.batches)

    def __iter__(self) -> Iterator[Batch]:
        return self.every(0, 1)

    def only(self, places: Sequence[int]) -> OrderedPoses:
        """Batches of the images in these places; the others are not read."""
        return OrderedPoses(*self.arguments, places)

    def every(self, first: int, step: int) -> Iterator[Batch]:
        """Each `step`-th batch from the `first` on; the others are not read."""
        self.order.first, self.order.every = first, step
        return iter(self.loader)
