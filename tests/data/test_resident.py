"""Images kept decoded: the same order, the same augmentation law and the same values as the loader's."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as VF
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torchvision.transforms import InterpolationMode

import okdc
from okdc.data import Data, load, open_source, resident
from okdc.data.batchwise import DRAWS, Law, crop_boxes, resized_crop
from okdc.data.resident import Decoded, ResidentTraining
from okdc.errors import DataError
from okdc.needs import NOTHING, Needs
from okdc.recipe import DataSettings
from okdc.recipe.strict import parse
from okdc.system.randomness import mix, uniform

CONFIG = {
    "input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3),
    "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip
NOISE = np.random.default_rng(0).integers(0, 256, (64, 24, 24, 3), dtype=np.uint8)


def data(
    needs: Needs = NOTHING, views: int = 1, config: dict[str, Any] = CONFIG, timeout: float = 0.0, **changes: Any
) -> Data:
    given = replace(DataSettings(workers=0, resident="on"), **changes)
    return load(
        open_source(given, 7), given, config, batch_size=40, validation_batch_size=64, seed=7, device="cpu",
        needs=needs, views=views, timeout=timeout,
    )  # fmt: skip


def equal(ours: Data, theirs: Data, epoch: int = 1) -> bool:
    pairs = list(zip(ours.train.batches(epoch), theirs.train.batches(epoch), strict=True))
    return all(torch.equal(x, y) for one, other in pairs for x, y in zip(one, other, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, pixels in enumerate(NOISE):
        path = tmp_path / "noise" / ("train" if i < 48 else "val") / str(i % 2) / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "noise"


# --- the same as the loader, where nothing is left to chance --------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "needs", "views"),
    [
        ({"no_aug": True, "mixup": 0.8}, Needs(), 1),
        ({"crop_padding": 0, "hflip": 0.0, "reprob": 0.5, "smoothing": 0.1}, Needs(indices=True), 1),
        ({"crop_padding": 0, "hflip": 1.0, "vflip": 1.0, "reprob": 0.5}, Needs(views=True), 3),
        ({"no_aug": True}, Needs(pairs=True, indices=True), 1),
    ],
)
def test_order_labels_and_values_are_the_loaders(changes: dict[str, Any], needs: Needs, views: int) -> None:
    kept, read = data(needs, views, **changes), data(needs, views, **changes, resident="off")
    assert isinstance(kept.train.loader, ResidentTraining) and not isinstance(read.train.loader, ResidentTraining)
    assert len(kept.train) == len(read.train) and equal(kept, read)
    assert kept.train.resident and not read.train.resident  # by which a run knows what makes it faster


def test_validation_and_what_is_set_aside_are_the_loaders() -> None:
    kept, read = data(Needs(held_out=True)), data(Needs(held_out=True), resident="off")
    for ours, theirs in ((kept.validation, read.validation), (kept.held_out, read.held_out)):
        for one, other in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_an_epoch_can_be_entered_anywhere_and_epochs_differ() -> None:
    for changes in ({"crop_padding": 4, "reprob": 0.3, "mixup": 0.2}, {"scale": [0.3, 1.0]}):
        whole = list(data(**changes).train.batches(3))
        rest = list(data(**changes).train.batches(3, 20))
        assert len(whole) == 35 and len(rest) == 15
        assert all(torch.equal(x, y) for one, other in zip(whole[20:], rest) for x, y in zip(one, other, strict=True))
        assert not torch.equal(whole[0][0], next(data(**changes).train.batches(4))[0])


def test_views_are_drawn_one_by_one_and_the_first_is_what_one_view_would_be() -> None:
    once, _ = next(data(crop_padding=4).train.batches(0))
    views, _ = next(data(Needs(views=True), 3, crop_padding=4).train.batches(0))
    assert views.shape == (3, 40, 3, 16, 16) and torch.equal(views[0], once)
    assert ((views[0] - views[1]).abs().amax((1, 2, 3)) > 0).float().mean() > 0.9


def test_decoded_images_leave_the_gpu_when_training_is_over_and_batches_still_come_there() -> None:
    given = data(Needs(held_out=True), holdout=0.2)
    kept = [each.kept for each in (given.train, given.validation, given.held_out, given.test)]
    assert len(set(map(id, kept))) == 4
    with FakeTensorMode() as mode:
        for each in kept:
            each.images = mode.from_tensor(each.images).to("cuda")
        given.leave_device()
        assert [each.images.device.type for each in kept] == ["cpu"] * 4
        for each in kept:
            assert each.batch(torch.zeros(5, dtype=torch.long), torch.device("cuda")).device.type == "cuda"


def test_a_run_gives_its_gpu_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Decoded] = []
    monkeypatch.setattr(Decoded, "leave_device", lambda kept: left.append(kept))
    settings = {"data": "digits", "img_size": 32, "method": "baseline", "epochs": 1, "batch_size": 512, "workers": 0}
    result = okdc.compress("test_resnet", output=tmp_path, onnx=False, device="cpu", **settings)
    assert left == [result.data.train.kept, result.data.validation.kept]


# --- the same law ---------------------------------------------------------------------------------------------------


def test_every_padded_crop_is_the_loaders_and_all_come_equally_often() -> None:
    image = Image.fromarray(NOISE[0][:6, :6])
    padded = VF.pad(image, [2], fill=0)
    crops = [VF.crop(padded, i, j, 6, 6) for i in range(5) for j in range(5)]
    possible = torch.stack([VF.pil_to_tensor(x) for crop in crops for x in (crop, VF.hflip(crop))]).flatten(1)
    law, draws = Law((6, 6), padding=2, hflip=0.5), 20_000
    found = law(VF.pil_to_tensor(image).expand(draws, -1, -1, -1), mix(torch.arange(draws))).flatten(1)
    counts = torch.stack([(found == each).all(1).sum() for each in possible])
    assert int(counts.sum()) == draws  # each is one of the fifty
    assert float(((counts - draws / 50) ** 2 / (draws / 50)).sum()) < 100  # chi-square, 49 degrees: p = 2e-5


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_resized_crop_is_pillows(interpolation: str) -> None:
    draw = torch.Generator().manual_seed(1)
    tall, wide = torch.randint(1, 25, (2, 64), generator=draw)
    top, left = (torch.rand(2, 64, generator=draw) * torch.stack([25 - tall, 25 - wide])).long()
    images = torch.from_numpy(NOISE).permute(0, 3, 1, 2)
    for size in ((16, 16), (24, 24), (9, 31)):
        ours = resized_crop(images, (top, left, tall, wide), size, interpolation)
        boxes = zip(NOISE, *(x.tolist() for x in (top, left, tall, wide)), strict=True)
        theirs = [_across_then_down(Image.fromarray(x), box, size, interpolation) for x, *box in boxes]
        assert torch.equal(ours, torch.stack(theirs))


def _across_then_down(image: Image.Image, box: list[int], size: tuple[int, int], interpolation: str) -> Tensor:
    crop, mode = VF.crop(image, *box), InterpolationMode(interpolation)
    return VF.pil_to_tensor(VF.resize(VF.resize(crop, [box[2], size[1]], mode), list(size), mode))


@pytest.mark.parametrize(("height", "width", "scale"), [(24, 24, (0.08, 1.0)), (10, 40, (0.5, 1.0))])
def test_boxes_are_distributed_as_timms(height: int, width: int, scale: tuple[float, float]) -> None:
    ratio, draws = (3 / 4, 4 / 3), 4000
    timms = RandomResizedCropAndInterpolation(16, scale, ratio)
    image = Image.new("L", (width, height))
    theirs = torch.tensor([timms.get_params(image, scale, ratio) for _ in range(draws)]).sort(0).values
    ours = crop_boxes(uniform(torch.arange(draws), DRAWS)[:, 4:], height, width, scale, ratio)
    for mine, other in zip(ours, theirs.unbind(1), strict=True):  # Kolmogorov and Smirnov: p = 1e-5
        edges = torch.arange(max(height, width) + 1)
        mine, other = mine.sort().values, other.contiguous()
        below = (torch.searchsorted(x, edges, right=True) / draws for x in (mine, other))
        assert float((next(below) - next(below)).abs().max()) < 2.47 * (2 / draws) ** 0.5


def test_random_numbers_are_even_and_independent() -> None:
    numbers = uniform(mix(torch.arange(20_000)), 4)
    assert numbers.min() >= 0 and numbers.max() < 1
    bins = torch.stack([torch.histc(column, 20, 0, 1) for column in numbers.unbind(1)])
    assert float(((bins - 1000) ** 2 / 1000).sum(1).max()) < 55  # chi-square, 19 degrees: p = 2e-5
    assert (torch.corrcoef(torch.cat([numbers[:-1], numbers[1:]], 1).T) - torch.eye(8)).abs().max() < 0.035


# --- when ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aa": "rand-m9-mstd0.5"}, "--aa changes one image at a time"),
        ({"color_jitter": 0.4}, "--color-jitter changes one image at a time"),
        ({"interpolation": "lanczos"}, "--interpolation lanczos"),
        ({"train_interpolation": "random"}, "--train-interpolation random"),
    ],
)
def test_what_cannot_be_kept_is_left_to_the_loader_or_refused(changes: dict[str, Any], words: str) -> None:
    assert not isinstance(data(**changes, resident="auto").train.loader, ResidentTraining)
    with pytest.raises(DataError, match=f"(?s){words}.*Leave out --resident on"):
        data(**changes)


def test_images_of_several_sizes_are_left_to_the_loader_unless_they_are_made_equal(folder: Path) -> None:
    Image.fromarray(NOISE[0][:20]).save(folder / "train" / "0" / "zz.png")
    assert not isinstance(data(data=str(folder), resident="auto").train.loader, ResidentTraining)
    with pytest.raises(DataError, match="not all of one size"):
        data(data=str(folder))
    assert isinstance(data(data=str(folder), no_aug=True).train.loader, ResidentTraining)


def test_large_images_are_left_to_the_loader_unless_asked_for(folder: Path) -> None:
    config = CONFIG | {"input_size": (3, 160, 160)}
    assert not isinstance(data(config=config, data=str(folder), resident="auto").train.loader, ResidentTraining)
    assert isinstance(data(config=config, data=str(folder), resident="on").train.loader, ResidentTraining)


def test_worker_processes_that_are_not_forked_decode_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, before = data(data=str(folder)), multiprocessing.get_start_method()
    monkeypatch.setattr(resident, "FEW", 48)  # of the training images alone
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert equal(alone, data(data=str(folder), workers=1))
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_unreadable_images_are_named_and_replaced_as_by_the_loader(folder: Path) -> None:
    broken = [folder / "train" / "0" / "04.png", folder / "val" / "1" / "51.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    options = {"data": str(folder), "no_aug": True}
    kept, read = data(Needs(indices=True), **options), data(Needs(indices=True), **options, resident="off")
    assert set(kept.bad_images) == set(map(str, broken))
    assert all(equal(kept, read, epoch) for epoch in range(4))
    assert [len(labels) for _, labels in kept.validation or ()] == [15]
    with pytest.raises(DataError, match="2 images cannot be read"):
        data(**options, max_bad_images=1)


@pytest.mark.parametrize("name", ["0/00", "1/31"])
def test_an_image_that_never_comes_is_an_error(folder: Path, name: str) -> None:
    image = folder / "train" / f"{name}.png"
    image.unlink()
    os.mkfifo(image)  # opening it waits for somebody to write, as on a network disk that is gone
    with pytest.raises(
        DataError, match=r"no image came for 0\.3 seconds while decoding, near position 0 of .*--timeout"
    ):
        data(data=str(folder), timeout=0.3)


def test_on_and_off_are_words_in_recipes() -> None:
    assert parse("resident: on\nhere: off\namp: true\nyes: no", "it") == {
        "resident": "on", "here": "off", "amp": True, True: False,
    }  # fmt: skip


def test_how_many_are_kept_is_a_share_of_the_memory_and_free_memory_is_asked_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("okdc.system.memory.total", lambda: 80 * 2**30)
    assert resident._room(cpu) == 10 * 2**30
    monkeypatch.setattr(resident, "local_world", lambda: 4)
    assert resident._room(cpu) == 2.5 * 2**30
    monkeypatch.setattr("okdc.system.memory.total", lambda: None)
    assert resident._room(cpu) == 2**30
    monkeypatch.setattr("okdc.system.memory.free", lambda: 1000)
    read = data(resident="auto")
    assert read.train.kept is None and "as they usually would be: memory is short" in caplog.text


def test_validation_is_not_decoded_before_a_training_that_reads_image_by_image() -> None:
    read = data(resident="auto", aa="rand-m9-mstd0.5")
    assert read.train.kept is None and read.validation.kept is None and data(resident="auto").validation.kept
