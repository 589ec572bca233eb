"""--balanced-sampling: every class equally often in an epoch, and every image of a class in its turn."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import okdc
from okdc.cli import main
from okdc.data import Data, load, open_source
from okdc.data.images import Images
from okdc.data.samples import Order
from okdc.data.streams import Stream
from okdc.data.values import Source
from okdc.errors import DataError, RecipeError
from okdc.needs import Needs
from okdc.pipeline import class_weights
from okdc.recipe import DataSettings, Recipe, override
from okdc.system import files
from okdc.training import checkpoint

CONFIG = {
    "input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3,
    "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip
COUNTS = (90, 7, 1, 2)  # one class has most images, another a single one
LABELS = torch.cat([torch.full((count,), cls) for cls, count in enumerate(COUNTS)])[torch.randperm(sum(COUNTS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 4 and 28 training images, whose pixels say which image it is."""
    root = tmp_path_factory.mktemp("uneven")
    for split, counts in (("train", (4, 28)), ("val", (4, 4))):
        for cls, count in enumerate(counts):
            for i in range(count):
                path = root / split / str(cls) / f"{i:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((20, 20, 3), 100 * cls + 3 * i, np.uint8)).save(path)
    return root


def loaded(folder: Path | str, needs: Needs | None = None, seed: int = 7, **changes: Any) -> Data:
    given = replace(DataSettings(data=str(folder), workers=0, resident="off", balanced_sampling=True), **changes)
    return load(
        open_source(given, seed), given, CONFIG, batch_size=8, validation_batch_size=8, seed=seed, device="cpu",
        needs=needs or Needs(indices=True),
    )  # fmt: skip


def epochs(count: int) -> list[torch.Tensor]:
    order = Order(LABELS, 3, balanced=True)
    return [order.of(epoch) for epoch in range(count)]


def test_every_class_has_its_share_of_an_epoch_and_no_image_comes_again_before_its_class_is_through() -> None:
    for order in epochs(5):
        assert len(order) == len(LABELS)
        assert LABELS[order].bincount().tolist() == [25] * 4
        for cls, count in enumerate(COUNTS):
            times = order.bincount(minlength=len(LABELS))[LABELS.eq(cls)]
            assert times.max() == -(-25 // count) and times.min() == 25 // count


def test_images_of_a_frequent_class_take_turns_and_epochs_differ() -> None:
    drawn = epochs(4)
    frequent = [set(order[LABELS[order] == 0].tolist()) for order in drawn]
    assert not frequent[0] & frequent[1] and len(set.union(*frequent)) == 90
    assert LABELS[drawn[0]].tolist() != LABELS[drawn[1]].tolist()
    assert not torch.equal(drawn[0], Order(LABELS, 4, balanced=True).of(0))


def test_an_epoch_that_cannot_be_divided_evenly_is_cut_at_random() -> None:
    labels = LABELS[:98]
    counts = torch.stack([labels[Order(labels, 0, balanced=True).of(epoch)].bincount() for epoch in range(200)])
    assert (counts.sum(1) == 98).all() and counts.max() == 25
    assert (counts.float().mean(0) - 24.5).abs().max() < 0.2


@pytest.mark.parametrize("changes", [{}, {"resident": "on"}], ids=["read", "resident"])
def test_batches_are_a_function_of_seed_epoch_and_place(folder: Path, changes: dict[str, Any]) -> None:
    whole = list(loaded(folder, **changes).train.batches(2))
    again = list(loaded(folder, **changes, workers=2 * (not changes)).train.batches(2, start=1))
    assert len(whole) == 4 and len(again) == 3
    assert all(torch.equal(x, y) for one, two in zip(whole[1:], again) for x, y in zip(one, two, strict=True))
    images, labels, indices = (torch.cat(parts) for parts in zip(*whole))
    assert labels.bincount().tolist() == [16, 16]
    rare = [images[indices == index] for index in indices[labels == 0].unique()]
    assert len(rare) == 4 and all(len(copies) == 4 for copies in rare)


def test_an_image_that_comes_again_is_augmented_anew(folder: Path) -> None:
    for resident in ("off", "on"):
        noisy = loaded(folder, resident=resident, crop_padding=6, hflip=0.0)
        images, _, indices = (torch.cat(parts) for parts in zip(*noisy.train.batches(0)))
        copies = images[indices == indices[indices.bincount()[indices] == 4][0]]
        assert len(copies) == 4 and len(copies.flatten(1).unique(dim=0)) > 1


def test_an_unreadable_image_is_stood_in_for_by_another_of_its_class(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read = loaded(folder), Images.__getitem__
    lost = int((data.train_labels == 0).nonzero()[0])

    def sometimes(self: Images, position: int) -> tuple[Image.Image, int]:
        if position == lost and len(self) == 32:
            raise OSError("broken")
        return read(self, position)

    monkeypatch.setattr(Images, "__getitem__", sometimes)
    _, labels, indices = (torch.cat(parts) for parts in zip(*data.train.batches(0)))
    assert labels.bincount().tolist() == [16, 16] and lost not in indices


def test_what_has_an_order_of_its_own_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"every class equally often already\. Leave out --balanced-sampling"):
        loaded(folder, Needs(pairs=True))
    given = DataSettings(data="wds/shards", balanced_sampling=True)
    stream = Source(Stream(lambda size: None), None, ("a", "b"), "shards")
    with pytest.raises(DataError, match=r"wds/shards is a stream.*--class-weights FILE"):
        load(stream, given, CONFIG, batch_size=8, validation_batch_size=8, seed=0, device="cpu")
    network, loader = torch.nn.Linear(2, 2), [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]
    with pytest.raises(RecipeError, match="balanced_sampling cannot act on a loader of your own"):
        okdc.compress(network, loader, balanced_sampling=True)
    with pytest.raises(DataError, match="WeightedRandomSampler"):
        okdc.compress(network, loader, recipe=override(Recipe(), {"balanced_sampling": True}), method="baseline")


def test_weighing_rare_classes_as_well_is_said_to_be_too_much(caplog: pytest.LogCaptureFixture) -> None:
    data: Any = SimpleNamespace(train_labels=torch.tensor([0, 0, 1]), classes=("a", "b"), name="photos")
    asked = {"class_weights": "auto", "device": "cpu"}
    class_weights.of(override(Recipe(), asked), data)
    assert not caplog.records
    class_weights.of(override(Recipe(), {**asked, "balanced_sampling": True}), data)
    assert "weigh rare classes twice" in caplog.text


def test_a_run_goes_on_in_the_middle_of_a_balanced_epoch(folder: Path, tmp_path: Path) -> None:
    words = f"compress --model resnet20_cifar --method baseline --data {folder} --img-size 16 --balanced-sampling "
    words += "--epochs 2 -b 8 -j 0 --no-onnx --device cpu --recovery-interval 3 --checkpoint-hist 9 --output "

    def weights(experiment: str, *further: str) -> tuple[dict[str, Any], str]:
        result = CliRunner().invoke(main, [*words.split(), str(tmp_path), "--experiment", experiment, *further])
        assert result.exit_code == 0, result.output
        return checkpoint.load(tmp_path / experiment / checkpoint.LAST)["state_dict"], result.output

    whole, _ = weights("whole")
    saved = files.history(tmp_path / "whole" / checkpoint.LAST, 9)
    (tmp_path / "cut").mkdir()
    shutil.copyfile(saved[1], tmp_path / "cut" / checkpoint.LAST)  # of step 3 of the second epoch
    shutil.copyfile(saved[2], tmp_path / "cut" / checkpoint.BEST)
    cut, said = weights("cut", "--resume", "auto")
    assert "1 epoch and 3 steps are done" in said
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())
