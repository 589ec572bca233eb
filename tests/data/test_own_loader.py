"""Loaders of one's own in Python: in the same order when resumed, and refused where they cannot be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from okdc.data import wrap
from okdc.errors import DataError
from tests.helpers.images import generator_states, same


def tensors(count: int = 10, classes: int = 3) -> TensorDataset:
    return TensorDataset(torch.arange(count * 3 * 4 * 4).float().view(count, 3, 4, 4), torch.arange(count) % classes)


def test_a_loader_keeps_its_order_when_it_is_resumed() -> None:
    data = wrap(DataLoader(tensors(), batch_size=4, shuffle=True), DataLoader(tensors(6), batch_size=4), seed=5)
    assert (len(data.train), data.sizes, data.classes) == (3, (10, 6), ("0", "1", "2"))
    assert data.preprocess["input_size"] == (3, 4, 4) and data.validation_images is None
    before = generator_states()
    whole = list(data.train.batches(2))
    assert generator_states() == before
    assert same(whole[1:], data.train.batches(2, start=1)) and not same(whole, data.train.batches(3))
    assert sum(len(labels) for _, labels in data.validation or ()) == 6
    assert same(data.validation or (), data.validation or ())


def test_lists_and_other_iterables_can_be_read_again() -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(batches)

    batches = list(DataLoader(tensors(), batch_size=4))
    for loader in (batches, Stream()):
        data = wrap(loader)
        assert (len(data.train), data.sizes[0], data.validation) == (3, 10, None)
        assert same(data.train.batches(0), batches) and same(data.train.batches(1, 2), batches[2:])


def test_classes_come_from_the_data_set_or_the_argument() -> None:
    dataset = tensors()
    dataset.classes = ["cat", "dog", "bird"]  # type: ignore[attr-defined]
    part = torch.utils.data.Subset(dataset, [0, 3, 4])
    assert wrap(DataLoader(part, batch_size=2)).classes == ("cat", "dog", "bird")
    assert len(wrap(DataLoader(tensors(), batch_size=2), num_classes=7).classes) == 7


def test_samplers_are_told_the_epoch() -> None:
    sampler: Any = torch.utils.data.DistributedSampler(tensors(), num_replicas=1, rank=0)
    data = wrap(DataLoader(tensors(), batch_size=5, sampler=sampler))
    assert not same(data.train.batches(0), data.train.batches(1)) and sampler.epoch == 1


def test_soft_labels_train() -> None:
    data = wrap([(torch.zeros(2, 3, 4, 4), torch.full((2, 4), 0.25))])
    assert len(data.classes) == 4 and next(data.train.batches(0))[1].shape == (2, 4)


IMAGES, LABELS = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (iter([(IMAGES, LABELS)]), "only once.*DataLoader"),
        (((IMAGES, LABELS) for _ in range(2)), "only once.*DataLoader"),
        (5, "int, which cannot be iterated over"),
        (Dataset(), "cannot be iterated over; expected a torch DataLoader"),
        ([], "is empty"),
        ([IMAGES], "gave a Tensor; expected two tensors"),
        ([(IMAGES, LABELS, LABELS)], r"tuple of \(Tensor, Tensor, Tensor\)"),
        ([(IMAGES, [0, 1])], r"tuple of \(Tensor, list\)"),
        ([(IMAGES[0], LABELS)], r"shape \(3, 4, 4\)"),
        ([(IMAGES.byte(), LABELS)], "torch.uint8; expected float"),
        ([(IMAGES, LABELS.int())], r"torch.int32.*labels.long\(\)"),
        ([(IMAGES, LABELS[:1])], "for 2 images"),
        ([(IMAGES, LABELS - 1)], "from -1 to 0"),
        ([(IMAGES, LABELS * 0)], "one class only"),
    ],
)
def test_loaders_that_cannot_be_trained_on(loader: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        wrap(loader)


def test_labels_that_the_network_does_not_have_are_refused_when_met() -> None:
    late = [(IMAGES, LABELS), (IMAGES, LABELS + 4)]
    with pytest.raises(DataError, match="from 4 to 5; expected 0 to 1"):
        list(wrap(late, num_classes=2).train.batches(0))
    with pytest.raises(DataError, match="validation loader gave labels from 4 to 5"):
        wrap([(IMAGES, LABELS)], late[1:])


def test_an_iterable_that_runs_dry_is_an_error_not_a_short_epoch() -> None:
    class Dry:
        def __init__(self) -> None:
            self.batches = iter([(IMAGES, LABELS)] * 3)

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return self.batches

    with pytest.raises(DataError, match=r"none in epoch 0.*read again"):
        list(wrap(Dry()).train.batches(0))
