"""The batches of a user's own loader: checked one by one, divided among processes, the same when a run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from okdc import tasks
from okdc.data import own_images
from okdc.data.values import Batch
from okdc.errors import DataError
from okdc.system.randomness import iterate_seeded
from okdc.tasks.task import Task


class OwnBatches:
    """Training batches of the user's loader; skipped batches are read and thrown away.

    A single image among larger batches is left out, as drop_last would do with the last: batch norm cannot learn from
    one. So are, of several ranks' batches, those that are not of one size.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        steps: int,
        num_classes: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        task: Task | None = None,
        views: Sequence[str] = ("strong",),
    ):
        self.task, self.views = task or tasks.get(), views
        self.loader, self.steps, self.num_classes, self.seed = loader, steps // world, num_classes, seed
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.steps

    @property
    def in_order(self) -> bool:
        """Whether it gives its images in one order always, which may be class by class, as far as can be told."""
        return not own_images.shuffles(self.loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (0-based) from step `start` on; samplers with `set_epoch` are told the epoch."""
        for part in (*_samplers(self.loader), getattr(self.loader, "dataset", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        step = -1
        checked = (
            checked_batch(b, "training", self.num_classes, self.task, self.views)
            for b in iterate_seeded(self.loader, self.seed, epoch)
        )
        for step, batch in enumerate(self._own(_without_single(checked))):
            if step >= start:
                yield batch
        if step < 0:
            raise DataError(
                f"the training loader gave batches once, but none in epoch {epoch}; expected an iterable that can be "
                "read again each epoch, such as a torch DataLoader or a list of batches."
            )

    def _own(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while len(group := list(islice(batches, self.world))) == self.world:
            if len({len(labels) for _, labels in group}) == 1:
                yield group[self.rank]


def _without_single(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, without those of one image where the first has more."""
    least = 1
    for i, batch in enumerate(batches):
        least = min(2, len(batch[1])) if i == 0 else least
        if len(batch[1]) >= least:
            yield batch


def division(loader: Any, rank: int, world: int) -> tuple[int, int]:
    """Which of how many batches are this rank's: all where the loader's sampler has seen to it."""
    return (0, 1) if is_divided(loader) else (rank, world)


def is_divided(loader: Any) -> bool:
    """Whether it gives one process's part: torch's DistributedSampler and timm's alike know of how many."""
    return any(getattr(sampler, "num_replicas", 1) > 1 for sampler in _samplers(loader))


def _samplers(loader: Any) -> list[Any]:
    batches = getattr(loader, "batch_sampler", None)
    return [getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]


class OwnValidation:
    """Validation batches of the user's loader, with the same random numbers in each pass."""

    def __init__(self, loader: Iterable[Any], num_classes: int, seed: int, task: Task | None = None):
        self.task = task or tasks.get()
        self.loader, self.num_classes, self.seed = loader, num_classes, seed

    @property
    def labels(self) -> Tensor | None:
        """The kinds (images,) where they are known without decoding an image, and the images come in order."""
        if isinstance(self.loader, (list, tuple)):
            return self.task.kinds(torch.cat([labels for _, labels in self.loader]))
        return own_images.labels(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in iterate_seeded(self.loader, self.seed):
            yield checked_batch(batch, "validation", self.num_classes, self.task)


def checked_batch(batch: Any, role: str, num_classes: int, task: Task, views: Sequence[str] = ("strong",)) -> Batch:
    parts = batch if isinstance(batch, (tuple, list)) else ()
    if len(views) > 1 and parts:
        images = [checked_batch((each, *parts[1:]), role, num_classes, task) for each in _views(parts[0], views)]
        return torch.stack([view for view, _ in images]), images[0][1]
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        given = f"{type(batch).__name__} of ({', '.join(type(part).__name__ for part in parts)})"
        raise DataError(
            f"the {role} loader gave a {given if parts else type(batch).__name__}; expected two tensors, (images, "
            "labels). Give the loader a collate_fn that returns those."
        )
    images, labels = parts
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError(
            f"the {role} loader gave images of shape {tuple(images.shape)} and type {images.dtype}; expected float "
            "(B, C, H, W), normalised. Add torchvision's ToTensor() and Normalize(mean, std) to the data set's "
            "transform."
        )
    return images.float(), task.checked_labels(labels, len(images), role, num_classes)


def _views(images: Any, views: Sequence[str]) -> Sequence[Tensor]:
    """The views of a batch of a loader that gives several; DataError where there are not as many as there should be."""
    if not isinstance(images, (tuple, list)) or len(images) != len(views):
        given = f"{len(images)} of them" if isinstance(images, (tuple, list)) else f"one {type(images).__name__}"
        wanted = f"{len(views)} views of each image ({', '.join(views)})"
        raise DataError(
            f"the method needs {wanted}, and the training loader gave {given}; expected batches of ([a tensor (B, C, "
            "H, W) for each view], labels), as from a data set of ((view, view), label). Or name the data instead "
            "(data=FOLDER), and okdc makes the views."
        )
    return images
