"""A loader of one's own on several ranks: each reads its own batches alone, and they are those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from okdc.data import Data, wrap
from tests.helpers.images import generator_states, same


class Noisy(Dataset):
    """Images that say which one they are, with noise, and who was read."""

    def __init__(self, images: int) -> None:
        self.images, self.read = images, list[int]()

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return index + torch.rand(3, 4, 4), index % 3


def wrapped(images: int, rank: int = 0, world: int = 1, **options: Any) -> tuple[Data, Noisy, Noisy]:
    train, judged = Noisy(images), Noisy(7)
    loaders = (DataLoader(train, 4, shuffle=True, **options), DataLoader(judged, 2))
    data = wrap(*loaders, num_classes=3, seed=5, rank=rank, world=world)
    train.read.clear(), judged.read.clear()
    return data, train, judged


@pytest.mark.parametrize("images", [32, 29, 31])  # the last group of batches whole, with a single image, of two sizes
def test_ranks_read_only_their_own_batches_and_these_are_those_of_one_process(images: int) -> None:
    alone, *_ = wrapped(images)
    whole, validation = list(alone.train.batches(2)), list(alone.validation or ())
    read, judged = [], []
    before = generator_states()
    for rank in range(2):
        data, train, evaluated = wrapped(images, rank, 2)
        steps = images // 8
        assert same(data.train.batches(2), whole[rank : 2 * steps : 2])
        assert len(list(data.train.batches(3, 1))) == steps - 1
        assert same(data.validation.every(rank, 2), validation[rank::2])  # type: ignore[union-attr]
        read += train.read
        judged += evaluated.read
    assert generator_states() == before
    assert len(read) == 2 * 8 * (images // 8) and sorted(judged) == list(range(7))


def test_workers_of_all_ranks_draw_as_those_of_one_process() -> None:
    whole = list(wrapped(32, num_workers=2, worker_init_fn=int)[0].train.batches(1))
    for rank in range(2):
        data, *_ = wrapped(32, rank, 2, num_workers=1, persistent_workers=True, worker_init_fn=int)
        assert same(data.train.batches(1), whole[rank::2])


def test_a_loader_whose_order_is_not_known_is_read_whole_and_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Noisy(16)
    plain = DataLoader(dataset, 4)
    weighted = DataLoader(dataset, 4, sampler=WeightedRandomSampler([1.0] * 16, 16))
    for loader in (plain, list(plain)):
        wrap(loader, num_classes=3, world=2)
    assert not caplog.records
    data = wrap(weighted, num_classes=3, rank=1, world=2)
    assert "each of 2 processes reads the whole training loader" in caplog.text
    dataset.read.clear()
    assert len(list(data.train.batches(0))) == 2 and len(dataset.read) == 16
