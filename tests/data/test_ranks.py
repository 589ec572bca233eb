"""Ranks divide the batch of one process, and every validation image is counted once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from okdc.data import Data, load, open_source, wrap
from okdc.data.samples import Part
from okdc.errors import DataError
from okdc.needs import NOTHING, Needs
from okdc.recipe import DataSettings
from tests.helpers.processes import CONFIG


def digits(batch_size: int, number: int = 0, of: int = 1, needs: Needs = NOTHING, **settings: Any) -> Data:
    wanted = DataSettings(workers=0, **settings)
    return load(
        open_source(wanted, 1), wanted, CONFIG, batch_size=batch_size, validation_batch_size=50, seed=1, device="cpu",
        needs=needs, views=2 if needs.views else 1, rank=number, world=of,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("needs", "settings"),
    [
        (NOTHING, {}),
        (NOTHING, {"mixup": 0.4, "cutmix": 1.0, "reprob": 0.5, "aa": "rand-m9-mstd0.5"}),
        (Needs(pairs=True), {}),
        (Needs(indices=True), {"reprob": 0.5}),
        (Needs(views=True), {"mixup": 0.4, "reprob": 0.5}),
        (Needs(views=("weak", "strong")), {"mixup": 0.4, "reprob": 0.5, "aa": "rand-m9-mstd0.5"}),
        (Needs(indices=True), {"balanced_sampling": True}),
    ],
    ids=["plain", "blended", "pairs", "indices", "views", "weak and strong", "balanced"],
)
def test_four_processes_see_the_batch_of_one(needs, settings):
    batches = [next(digits(24, needs=needs, **settings).train.batches(1, 3))]
    batches += [next(digits(6, i, 4, needs, **settings).train.batches(1, 3)) for i in range(4)]
    places = [place for i in range(4) for place in Part(6, i, 4, mirrored="mixup" in settings).places()]
    assert sorted(places) == list(range(24))
    for whole, *parts in zip(*batches, strict=True):
        axis = 1 if needs.views and whole.dim() > 2 else 0
        together = torch.cat(parts, axis).index_select(axis, torch.tensor(places).argsort())
        torch.testing.assert_close(together, whole)


def test_every_validation_image_is_counted_once():
    data = digits(8)
    whole = [labels.tolist() for _, labels in data.validation]
    parts = [[labels.tolist() for _, labels in digits(8).validation.every(i, 3)] for i in range(3)]
    assert len(whole) == len(data.validation) == 8
    assert [each for i in range(8) for each in [parts[i % 3][i // 3]]] == whole
    assert [labels.tolist() for _, labels in data.validation] == whole  # again, whole


def test_batches_of_ones_own_are_divided_and_those_of_a_distributed_sampler_are_not():
    batches = [
        (torch.full((2 if i < 6 else 1, 3, 8, 8), float(i)), torch.zeros(2 if i < 6 else 1).long()) for i in range(7)
    ]
    seen = [
        [int(images[0, 0, 0, 0]) for images, _ in wrap(batches, num_classes=2, rank=i, world=2).train.batches(0)]
        for i in range(2)
    ]
    assert seen == [[0, 2, 4], [1, 3, 5]]
    for loader in parts_of_eight():
        mine = [wrap(loader, num_classes=8, rank=1, world=2).train.batches(epoch) for epoch in range(2)]
        seen = [torch.cat([labels for _, labels in batches]).tolist() for batches in mine]
        assert [len(set(each)) for each in seen] == [4, 4] and seen[0] != seen[1]  # half of them, others each time


def parts_of_eight() -> list[DataLoader]:
    """The second half of eight images, as a DataLoader divides it and as one with a batch sampler does."""
    dataset = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8))
    sampler = DistributedSampler(dataset, 2, 1)
    return [
        DataLoader(dataset, 2, sampler=sampler), DataLoader(dataset, batch_sampler=BatchSampler(sampler, 2, False))
    ]  # fmt: skip


def test_a_validation_loader_that_is_divided_already_is_refused():
    whole = [(torch.randn(8, 3, 8, 8), torch.arange(8))]
    for loader in parts_of_eight():
        with pytest.raises(DataError, match="leave out its sampler, and okdc divides its batches"):
            wrap(whole, loader, num_classes=8, rank=1, world=2)
