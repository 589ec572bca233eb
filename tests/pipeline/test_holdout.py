"""Images set aside from training pick the epoch; the validation images judge it once and pick nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import okdc
from okdc.data import load, open_source
from okdc.errors import DataError
from okdc.recipe import Recipe, override

SETTINGS: dict[str, Any] = {
    "data": "digits", "img_size": 32, "method": "baseline", "batch_size": 64, "workers": 0, "onnx": False, "seed": 1,
    "device": "cpu",
}  # fmt: skip


def opened(holdout: float | None) -> Any:
    settings = override(Recipe(), SETTINGS | {"holdout": holdout}).data
    config = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    config |= {"crop_pct": 1.0, "crop_mode": "center"}
    return load(
        open_source(settings, 1), settings, config, batch_size=64, validation_batch_size=None, seed=1, device="cpu"
    )


def test_what_is_set_aside_is_of_each_class_and_not_trained_on() -> None:
    plain, apart = opened(None), opened(0.1)
    aside = [label for _, labels in apart.validation for label in labels.tolist()]
    assert len(aside) + apart.sizes[0] == plain.sizes[0]
    assert len(aside) == pytest.approx(plain.sizes[0] / 10, rel=0.05) and set(aside) == set(range(10))
    assert [len(labels) for _, labels in apart.test] == [len(labels) for _, labels in plain.validation]
    assert apart.sizes[1] == plain.sizes[1] and plain.test is None


def test_the_figures_of_a_run_are_those_of_the_validation_images(tmp_path: Path) -> None:
    result = okdc.compress("resnet20_cifar", **SETTINGS, epochs=2, holdout=0.2, output=tmp_path)
    row = result.metrics
    history = (result.path / "summary.csv").read_text().splitlines()
    assert len(history) == 3 and row["holdout"] == pytest.approx(max(float(line.split(",")[3]) for line in history[1:]))
    from okdc.training.evaluation import judge
    from okdc.training.machine import Machine

    assert result.data.validation is not None
    again, counts = judge(result.student, result.data.validation, Machine.of(result.recipe.train))
    assert {name: row[name] for name in again} == again and int(counts.sum()) == result.data.sizes[1]
    assert "set aside" in (result.path / "report.html").read_text(encoding="utf-8")


def test_a_class_of_one_image_is_kept_and_nothing_is_left_to_set_aside(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(tmp_path / split / name / "1.png")
    with pytest.raises(DataError, match=r"--holdout 0\.1: no class .* has two training images"):
        okdc.compress("resnet20_cifar", **SETTINGS | {"data": str(tmp_path), "holdout": 0.1, "batch_size": 2})
