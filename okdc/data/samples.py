"""Which images come when, and one image read and augmented: a function of seed, epoch and image alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from okdc.data.balance import balanced_order
from okdc.data.images import Images
from okdc.data.pairs import images_per_class, paired_order
from okdc.data.transforms import read
from okdc.data.values import BadImage
from okdc.system.randomness import borrowed_generators, derive_seed, reseed


def as_loaded(batch: Any) -> Any:
    """The collate_fn of data sets that load whole batches; a function of the module's, as workers may be sent it."""
    return batch


Loaded = tuple[Tensor, Tensor, list[BadImage]]


def collate(samples: list[tuple[list[Tensor], int]], bad: list[BadImage]) -> Loaded:
    """Samples of (views, position) as images (V * B, C, H, W), view by view, and positions (B,) int64."""
    if not samples:
        return torch.empty(0), torch.empty(0, dtype=torch.int64), bad
    views, positions = zip(*samples)
    return torch.stack([image for view in zip(*views) for image in view]), torch.tensor(positions), bad


class Order:
    """Which image stands where in an epoch: a permutation, or `balanced`, or with `pairs_in` batches of so many pairs.

    Where an image may come twice in an epoch, the order `repeats`.
    """

    def __init__(self, labels: Tensor, seed: int, pairs_in: int | None = None, balanced: bool = False):
        self.labels, self.seed, self.pairs_in, self.balanced = labels, seed, pairs_in, balanced
        self.per_class = images_per_class(labels, pairs_in) if pairs_in else 0
        self.repeats = balanced or pairs_in is not None

    def of(self, epoch: int) -> Tensor:
        """Positions of images, (N,); the first whole batches of them are the epoch."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        if self.pairs_in:
            return paired_order(self.labels, self.pairs_in, self.per_class, generator)
        if self.balanced:
            return balanced_order(self.labels, self.seed, epoch, generator)
        return torch.randperm(len(self.labels), generator=generator)

    def candidates(self, positions: Tensor, place: int) -> Iterator[int]:
        """The image whose place it is, then those that may stand in for it: the next ones, or others of its class."""
        own = int(positions[place])
        yield own
        if self.repeats:
            whole = self.pairs_in or 1
            first = place - place % whole
            present = set(positions[first : first + whole].tolist())
            alike = (self.labels == self.labels[own]).nonzero().flatten().roll(-own).tolist()
            yield from (position for position in alike if position not in present)
        for further in range(1, len(positions)):
            yield int(positions[(place + further) % len(positions)])


class TrainImages(Dataset):
    """Loads whole batches by (epoch, position in the epoch's order), each image by each of `transforms`: its views.

    An unreadable image gives its place to another (`Order.candidates`); after `attempts` in a row its place stays
    empty, which whoever counts the bad images turns into an error.
    """

    def __init__(
        self,
        images: Images,
        order: Order,
        transforms: Sequence[Any],
        config: dict[str, Any],
        attempts: int,
        seed: int,
    ):
        self.images, self.transforms, self.config = images, transforms, config
        self.order, self.attempts, self.seed = order, attempts, seed
        self.epoch, self.positions = -1, torch.empty(0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, places: list[tuple[int, int]]) -> Loaded:
        bad: list[BadImage] = []
        with borrowed_generators(self.seed):
            samples = [self._sample(epoch, position, bad) for epoch, position in places]
        return collate([sample for sample in samples if sample is not None], bad)

    def _sample(self, epoch: int, place: int, bad: list[BadImage]) -> tuple[list[Tensor], int] | None:
        if epoch != self.epoch:
            self.epoch, self.positions = epoch, self.order.of(epoch)
        for position in islice(self.order.candidates(self.positions, place), self.attempts):
            if (image := read(self.images, position, self.config, bad)) is not None:
                return [self._view(image, epoch, place, view) for view in range(len(self.transforms))], position
        return None

    def _view(self, image: Image.Image, epoch: int, place: int, view: int) -> Tensor:
        # The place's own image seeds, so that a stand-in is not cropped as it is in its own place. Where an image may
        # come twice in an epoch, the place seeds too.
        twice = place if self.order.repeats else 0
        reseed(self.seed, epoch, int(self.positions[place]), 2, view, twice)
        return self.transforms[view](image)


class ValidationImages(Dataset):
    """Loads whole batches by position; an unreadable image is left out."""

    def __init__(self, images: Images, transform: Any, config: dict[str, Any]):
        self.images, self.transform, self.config = images, transform, config

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, positions: list[int]) -> Loaded:
        bad: list[BadImage] = []
        images = [(read(self.images, position, self.config, bad), position) for position in positions]
        return collate([([self.transform(image)], position) for image, position in images if image is not None], bad)


@dataclass(frozen=True)
class Part:
    """The `size` images that one rank has of a batch which `world` ranks share.

    They stand side by side; `mirrored`, half of them does at the front and half at the back, because mixup mixes an
    image with the one as far from the other end, which is then the same rank's (but for the odd one of an odd `size`).
    """

    size: int
    rank: int = 0
    world: int = 1
    mirrored: bool = False

    @property
    def whole(self) -> int:
        return self.size * self.world

    def places(self) -> list[int]:
        """Where the images stand in the whole batch."""
        if not self.mirrored:
            return list(range(self.rank * self.size, (self.rank + 1) * self.size))
        front, back = self.size - self.size // 2, self.size // 2
        end = self.whole - self.rank * back
        return [*range(self.rank * front, (self.rank + 1) * front), *range(end - back, end)]


class EpochPlaces(Sampler):
    """Batches of (epoch, place), from batch `start` of the epoch on: what is skipped is never read."""

    def __init__(self, num_images: int, part: Part):
        self.whole, self.places, self.steps = part.whole, part.places(), num_images // part.whole
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.steps):
            yield [(self.epoch, step * self.whole + place) for place in self.places]


class OrderedPlaces(Sampler):
    """Batches of positions, in their order: each `every`-th batch, from the `first` on."""

    def __init__(self, positions: Sequence[int], batch_size: int):
        starts = range(0, len(positions), batch_size)
        self.batches = [list(positions[start : start + batch_size]) for start in starts]
        self.first, self.every = 0, 1

    def __len__(self) -> int:
        return len(self.batches[self.first :: self.every])

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches[self.first :: self.every])
