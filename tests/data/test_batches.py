"""Batches are a function of epoch and seed, whatever the number of workers; blended, erased and cropped as asked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from okdc.data.batches import CountedBatches
from okdc.data.readable import BadImages
from okdc.errors import DataError
from okdc.training.machine import _precision
from tests.helpers.images import CONFIG, generator_states, loaded, same, settings


def test_batch_larger_than_the_data_set(folder: Path) -> None:
    with pytest.raises(DataError, match=r"24 training images, fewer than one batch of 25.*-b 24"):
        loaded(settings(folder), batch_size=25)


def test_channels_that_no_image_has(folder: Path) -> None:
    with pytest.raises(DataError, match=r"4 channels.*--in-chans"):
        loaded(settings(folder), config=CONFIG | {"input_size": (4, 16, 16)})


@pytest.mark.parametrize("changes", [{"aa": "rnd-m9"}, {"interpolation": "cubic"}])
def test_augmentation_that_timm_does_not_know(folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"{next(iter(changes.values()))}.*expected a policy"):
        loaded(settings(folder, **changes))


AUGMENTED = {"color_jitter": 0.3, "aa": "rand-m9-mstd0.5", "reprob": 0.5, "mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1}


def test_a_random_way_to_resize_needs_a_resized_crop(folder: Path) -> None:
    with pytest.raises(DataError, match=r"--train-interpolation random .*leave it out"):
        loaded(settings(folder, train_interpolation="random", crop_padding=2))


RANDOM = {
    "reprob": 0.7, "remode": "pixel", "recount": 3, "train_interpolation": "random", "mixup": 0.5, "cutmix": 1.0,
    "mixup_prob": 0.6, "mixup_switch_prob": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, AUGMENTED, {"crop_padding": 2}, RANDOM], ids=["plain", "augmented", "padded", "random"]
)
def test_batches_do_not_depend_on_the_number_of_workers(folder: Path, changes: dict[str, Any]) -> None:
    alone, pair = (loaded(settings(folder, workers=workers, **changes)) for workers in (0, 2))
    for epoch in (0, 1):
        assert same(alone.train.batches(epoch), pair.train.batches(epoch))
    assert same(alone.validation or (), pair.validation or ())


def test_start_gives_the_tail_of_the_epoch_without_reading_the_rest(folder: Path) -> None:
    data = loaded(settings(folder, **AUGMENTED))
    whole = list(data.train.batches(3))
    assert len(whole) == len(data.train) == 4
    for start in (1, 3, 4):
        assert same(whole[start:], data.train.batches(3, start=start))
    for path in (folder / "train").rglob("*.png"):
        path.unlink()
    assert list(data.train.batches(3, start=4)) == []


def test_epochs_and_seeds_differ(folder: Path) -> None:
    data, other = loaded(settings(folder)), loaded(settings(folder), seed=8)
    orders = [torch.cat([labels for _, labels in batches]).tolist() for batches in
              (data.train.batches(0), data.train.batches(1), other.train.batches(0))]  # fmt: skip
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_each_image_trains_once_an_epoch_and_the_tail_is_dropped(folder: Path) -> None:
    no_aug = settings(folder, no_aug=True)
    images = torch.cat([images for images, _ in loaded(no_aug, batch_size=6).train.batches(0)])
    assert len(images) == 24 and len(images.flatten(1).unique(dim=0)) == 24
    assert [len(labels) for _, labels in loaded(no_aug, batch_size=23).train.batches(0)] == [23]


def test_the_random_numbers_of_the_caller_are_left_alone(folder: Path) -> None:
    for workers in (0, 1):
        data = loaded(settings(folder, workers=workers, **AUGMENTED))
        before = generator_states()
        list(data.train.batches(0)), list(data.validation or ()), list(data.validation_images or ())
        assert generator_states() == before
    first = list(data.train.batches(0))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert same(first, data.train.batches(0))


def test_mixup_and_smoothing_give_soft_labels_for_odd_batches_too(folder: Path) -> None:
    for changes in ({"mixup": 0.4}, {"cutmix": 1.0}, {"smoothing": 0.1}, AUGMENTED):
        for batch_size in (1, 5, 6):
            images, labels = next(loaded(settings(folder, **changes), batch_size=batch_size).train.batches(0))
            assert images.shape == (batch_size, 3, 16, 16) and labels.shape == (batch_size, 4)
            torch.testing.assert_close(labels.sum(1), torch.ones(batch_size))
    _, smooth = next(loaded(settings(folder, smoothing=0.2)).train.batches(0))
    torch.testing.assert_close(smooth.max(1).values, torch.full((5,), 0.85))


def test_mixup_ends_at_its_epoch_and_may_leave_batches_alone(folder: Path) -> None:
    def mixed(epoch: int, **changes: Any) -> bool:
        (_, labels), *_ = loaded(settings(folder, mixup=1.0, no_aug=True, **changes)).train.batches(epoch)
        return bool((labels.max(1).values < 0.999).any())

    assert mixed(0) and mixed(2) and mixed(1, mixup_off_epoch=2)
    assert not mixed(2, mixup_off_epoch=2) and not mixed(0, mixup_prob=0.0)


def test_what_is_erased_is_filled_as_asked(folder: Path) -> None:
    def colors(**changes: Any) -> int:
        """Different values that erasing has put into the first channel of an image, in the image that has most."""
        clean, erased = (
            next(loaded(settings(folder, reprob=reprob, **changes)).train.batches(0))[0][:, 0] for reprob in (0.0, 1.0)
        )
        return max(len(new[new != old].unique()) for old, new in zip(clean, erased, strict=True))

    assert colors() == colors(remode="rand") == 1
    assert 1 < colors(remode="rand", recount=4) <= 4 < colors(remode="pixel")


def test_settings_override_the_networks_preprocessing(folder: Path) -> None:
    data = loaded(settings(folder, mean=[0.0], std=[1.0], interpolation="bicubic", crop_pct=0.5))
    expected = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic", "crop_pct": 0.5}
    assert data.preprocess == CONFIG | expected | {"exif": True}
    images, _ = next(iter(data.validation or ()))
    assert images.min() >= 0 and images.max() <= 1


def test_padding_crop_shifts_the_whole_image(folder: Path) -> None:
    data = loaded(settings(folder, crop_padding=4, hflip=0.0), config=CONFIG | {"input_size": (3, 20, 20)})
    images, _ = next(data.train.batches(0))
    assert images.shape == (5, 3, 20, 20) and (images == -2).any()


class Current:
    """`torch.cuda.device` on a machine that has none: which GPU is current."""

    index: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> None:
        Current.index = self.device.index

    def __exit__(self, *_: object) -> None:
        Current.index = None


def test_what_asks_for_the_current_gpu_is_told_the_one_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pinning:
        def __iter__(self) -> Iterator[Any]:
            pinned.append(Current.index)
            for label in (1, 2):
                pinned.append(Current.index)
                yield torch.zeros(2), torch.full((2,), label), []

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: Current.index == 1)
    pinned: list[int | None] = []
    batches = CountedBatches(Pinning(), BadImages(0, "training", (), torch.zeros(0), {}), None, torch.device("cuda:1"))  # type: ignore[arg-type]
    assert [(labels[0].item(), Current.index) for _, labels in batches] == [(1, None), (2, None)]
    assert pinned == [1, 1, 1]
    assert [_precision(None, torch.device(name)) for name in ("cuda:0", "cuda:1")] == [torch.float16, torch.bfloat16]
