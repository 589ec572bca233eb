"""Fewer images than there are: spread over the classes, the same for every runner, and said; never the first ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from okdc.verification import sample

CLASSES = 8
LABELS = torch.arange(CLASSES).repeat_interleave(25)  # 200 images, class by class
IMAGES = torch.arange(200.0).view(-1, 1, 1, 1)


class Batches:
    """Batches that tell their labels only where they are asked to; counts the images that are read."""

    def __init__(self, labels: Tensor | None) -> None:
        self.labels, self.read = labels, 0

    def __iter__(self) -> Any:
        for images, labels in zip(IMAGES.split(16), LABELS.split(16)):
            self.read += len(images)
            yield images, labels


def data(validation: Any, raw: bool = True) -> Any:
    images = [(int(image), int(label)) for image, label in zip(IMAGES.flatten(), LABELS)]
    return SimpleNamespace(
        validation=validation, validation_images=images if raw else None, sizes=(0, 200), classes=range(CLASSES)
    )


def taken(chosen: Any) -> tuple[list[int], list[int]]:
    images, labels = zip(*chosen.validation)
    return torch.cat(images).flatten().int().tolist(), torch.cat(labels).tolist()


def test_each_class_has_its_share_whatever_the_order() -> None:
    chosen = sample.take(data(Batches(LABELS)), 40)
    places, labels = taken(chosen)
    assert torch.tensor(labels).bincount().tolist() == [5] * CLASSES
    assert places == sorted(places) and places != list(range(40))
    assert [image for image, _ in chosen.validation_images] == places, "the same images raw"
    assert taken(sample.take(data(Batches(LABELS)), 40))[0] == places, "and always the same"
    assert sample.described(chosen, labels) == {
        "of": 200, "seed": 0, "by_class": True, "per_class": [5, 5],
        "told": "40 of 200 images, 5 of each class, seed 0",
    }  # fmt: skip
    rare = torch.tensor([0] * 97 + [1] * 3)
    for order in (rare, rare.flip(0)):
        assert order[sample.places(100, order, 34)].bincount().tolist() in ([33, 1], [32, 2])


def test_where_labels_are_not_known_places_are_drawn() -> None:
    batches = Batches(None)
    chosen = sample.take(data(batches), 40)
    places, labels = taken(chosen)
    assert len(set(places)) == 40 and len(set(labels)) == CLASSES
    assert batches.read == min(200, 16 * (places[-1] // 16 + 1)), "no further than the last of them"
    told = sample.described(chosen, labels)
    assert told is not None and not told["by_class"]
    assert (
        told["told"] == f"40 of 200 images, {min(told['per_class'])} to {max(told['per_class'])} of each class, seed 0"
    )


def test_all_images_are_no_sample() -> None:
    whole = data(list(zip(IMAGES.split(16), LABELS.split(16))), raw=False)
    for count in (None, 200, 1000):
        assert sample.take(whole, count) is whole
    assert sample.described(whole, LABELS.tolist()) is None
    assert sample.take(None, 5) is None
    few = sample.take(whole, 4)
    assert len(taken(few)[0]) == 4 and few.validation_images is None
    assert sample.take(few, 2) is few
