"""Batches on the GPU are those of the CPU: augmented there, or prefetched to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from okdc.data import Data, load, open_source
from okdc.data.batchwise import Law
from okdc.needs import NOTHING, Needs
from okdc.recipe import DataSettings

CONFIG = {
    "input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3),
    "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip


def data(device: torch.device | str, needs: Needs = NOTHING, views: int = 1, **changes: Any) -> Data:
    given = replace(DataSettings(workers=0), **changes)
    return load(
        open_source(given, 7), given, CONFIG, batch_size=40, validation_batch_size=64, seed=7, device=device,
        needs=needs, views=views,
    )  # fmt: skip


@pytest.mark.parametrize(
    "law",
    [
        Law((32, 32), padding=4, hflip=0.5, vflip=0.5),
        Law((32, 32), scale=(0.08, 1.0), ratio=(0.75, 1.3333), interpolation="bilinear", hflip=0.5),
        Law((32, 32), scale=(0.08, 1.0), ratio=(0.75, 1.3333), interpolation="bicubic"),
    ],
    ids=["padded", "bilinear", "bicubic"],
)
def test_augmentation_is_the_cpus_to_the_bit(law: Law, device: torch.device) -> None:
    images = torch.randint(0, 256, (64, 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(64) * 7919
    assert torch.equal(law(images.to(device), keys.to(device)).cpu(), law(images, keys))


@pytest.mark.parametrize(
    ("views", "changes"),
    [
        (1, {"resident": "on", "crop_padding": 4}),
        (1, {"resident": "on", "no_aug": True, "mixup": 0.8, "smoothing": 0.1}),
        (3, {"resident": "on", "crop_padding": 4}),
        (1, {"resident": "off", "workers": 2, "crop_padding": 4}),
        (3, {"resident": "off", "workers": 2, "crop_padding": 4}),
    ],
    ids=["resident", "mixed", "resident views", "prefetched", "prefetched views"],
)
def test_batches_are_the_cpus(views: int, changes: dict[str, Any], device: torch.device) -> None:
    needs = Needs(views=views > 1)
    ours, theirs = (data(place, needs, views, **changes) for place in (device, "cpu"))
    for split in (lambda each: each.train.batches(1), lambda each: each.validation):
        for one, other in zip(split(ours), split(theirs), strict=True):
            for x, y in zip(one, other, strict=True):
                assert x.device.type == device.type
                torch.testing.assert_close(x.cpu(), y, rtol=1e-5, atol=1e-5)


def test_decoded_images_give_the_gpu_back(device: torch.device, on_gpu: bool) -> None:
    given = data(device, resident="on", crop_padding=4)
    before, held = [x.cpu() for x, *_ in given.train.batches(0)], given.train.kept.images.nbytes
    taken = torch.cuda.memory_allocated(device) if on_gpu else held
    assert given.train.kept.images.device.type == device.type
    given.leave_device()
    assert (torch.cuda.memory_allocated(device) if on_gpu else 0) <= taken - held
    after = list(given.train.batches(0))
    assert after[0][0].device.type == device.type
    assert all(torch.equal(x, y.cpu()) for x, (y, *_) in zip(before, after, strict=True))
