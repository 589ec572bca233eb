"""The validation images that are looked at where not all are asked for: a sample, never the first of them.

Images often come class by class, and the first are then the first classes. Which images the sample has is a function of
a seed, of their number and, where labels are known without decoding, of these: sorted by class, in random order within
each, every so manieth is taken, so that each class has its share to within one image. Elsewhere (streams, loaders of a
user's own that do not tell) their places are drawn at random, and the images are read up to the last of them. Every
runner, predict.py too, gets the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from okdc import tasks
from okdc.tasks.task import Task
from okdc.verification.schema import Sample

SEED = 0


class Sampled:
    """Data with fewer validation images; all else is the whole data's."""

    def __init__(self, whole: Any, places: list[int], images: int, labels: Tensor | None) -> None:
        self.whole, self.places, self.images, self.labels = whole, places, images, labels
        self.by_class = labels is not None
        self.validation = _only(whole.validation, places, _Batches)
        raw = whole.validation_images
        self.validation_images = None if raw is None else _only(raw, places, _Items)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def take(data: Any | None, count: int | None) -> Any | None:
    """The data with `count` of its validation images; as it is where these are all, or where it has none."""
    if data is None or data.validation is None or count is None or isinstance(data, Sampled):
        return data
    labels = _labels(data.validation)
    images = len(labels) if labels is not None else data.sizes[1]
    return data if count >= images else Sampled(data, places(images, labels, count), images, labels)


def fewer(data: Any | None, count: int) -> Any | None:
    """The data with `count` of the validation images that it still has; as it is where these are no more."""
    if not isinstance(data, Sampled):
        return take(data, count)
    if count >= len(data.places):
        return data
    labels = None if data.labels is None else data.labels[data.places]
    chosen = [data.places[place] for place in places(len(data.places), labels, count)]
    return Sampled(data.whole, chosen, data.images, data.labels)


def places(images: int, labels: Tensor | None, count: int) -> list[int]:
    """Which `count` of so many images, in their order; labels: (images,) int64 where they are known."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(SEED))
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
        order = order[(2 * torch.arange(count) + 1) * images // (2 * count)]  # the middles of `count` equal parts
    return order[:count].sort().values.tolist()


def described(data: Any | None, labels: Sequence[Any], task: Task | None = None) -> Sample | None:
    """What the sample was, by the labels of the images that it gave; None where all images were looked at."""
    if not isinstance(data, Sampled):
        return None
    classes = len(getattr(data, "classes", ()))
    counts = (task or tasks.get()).per_output(torch.tensor(labels), classes)
    least, most = int(counts.min()), int(counts.max())
    each = str(least) if least == most else f"{least} to {most}"
    told = f"{len(labels):,} of {data.images:,} images, {each} of each class, seed {SEED}"
    return {"of": data.images, "seed": SEED, "by_class": data.by_class, "per_class": [least, most], "told": told}


def _labels(validation: Any) -> Tensor | None:
    """The labels (images,) of all batches where they are known without decoding an image."""
    if isinstance(validation, (list, tuple)):
        labels = torch.cat([torch.as_tensor(labels) for _, labels in validation])
        return labels if labels.ndim == 1 else None
    return getattr(validation, "labels", None)


def _only(images: Any, places: list[int], read: type[_Batches | _Items]) -> Iterable[Any]:
    """By the images' own way to leave out the others, else by reading these and dropping them."""
    return images.only(places) if hasattr(images, "only") else read(images, places)


class _Batches:
    """What is in certain places of batches that come in order."""

    def __init__(self, batches: Iterable[Any], places: list[int]) -> None:
        self.batches, self.places = batches, torch.tensor(places)

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for images, labels in self.batches:
            end = start + len(labels)
            inside = self.places[(self.places >= start) & (self.places < end)] - start
            if len(inside):
                yield torch.as_tensor(images)[inside], torch.as_tensor(labels)[inside]
            start = end
            if start > self.places[-1]:
                return


class _Items:
    """What is in certain places of images that come one by one."""

    def __init__(self, items: Iterable[Any], places: list[int]) -> None:
        self.items, self.places = items, places

    def __iter__(self) -> Iterator[Any]:
        wanted = set(self.places)
        for place, item in enumerate(self.items):
            if place in wanted:
                yield item
            if place == self.places[-1]:
                return
