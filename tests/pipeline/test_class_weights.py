"""Rare classes may count more in the cross-entropy with labels: by how rare they are, or as a file says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import okdc
from okdc.errors import DataError, RecipeError
from okdc.losses import cross_entropy, weighted
from okdc.pipeline import class_weights
from okdc.recipe import Recipe, override

NAMES = ("big one", "rare")


def asked(setting: str | None, labels: list[int] | None = None) -> torch.Tensor | None:
    known = None if labels is None else torch.tensor(labels)
    data: Any = SimpleNamespace(train_labels=known, classes=NAMES, name="photos")
    return class_weights.of(override(Recipe(), {"class_weights": setting, "device": "cpu"}), data)


def test_auto_is_inverse_frequency_with_mean_one_over_the_images() -> None:
    labels = [0] * 6 + [1] * 2
    weights = asked("auto", labels)
    assert weights is not None and weights.tolist() == pytest.approx([8 / 12, 2.0])
    assert weights[torch.tensor(labels)].mean() == pytest.approx(1)
    assert asked("auto", [1, 1]).tolist() == [0, 1]  # of a class without images nothing is learned anyway
    assert asked(None) is None
    with pytest.raises(DataError, match=r"photos does not say before .*--class-weights FILE"):
        asked("auto")


def test_a_file_gives_each_class_its_weight(tmp_path: Path) -> None:
    file = tmp_path / "weights.txt"
    file.write_text("rare\t3\n\nbig one 0.5\n")
    assert asked(str(file)).tolist() == [0.5, 3]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rare 1\n", "'big one' only in the data"),
        ("rare 1\nbig one 1\nsmall 1", "'small' only in the file"),
        ("rare many\nbig one 1", "expected CLASS WEIGHT, a weight of 0 or more, got 'rare many'"),
        ("rare -1\nbig one 1", "got 'rare -1'"),
        ("rare nan\nbig one 1", "got 'rare nan'"),
        ("3", "got '3'"),
        ("rare 1\nrare 2\nbig one 1", "weighs a class twice"),
        ("rare 0\nbig one 0", "no weight above 0"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_does_not_is_refused(text: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RecipeError, match=told):
        asked(str(file))


def test_each_image_counts_by_its_class_and_parts_of_a_batch_add_up() -> None:
    logits, labels, weights = torch.randn(6, 3), torch.tensor([0, 1, 1, 2, 2, 2]), torch.tensor([0.5, 1.0, 4.0])
    by_hand = (weights[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()
    with weighted(weights):
        torch.testing.assert_close(cross_entropy(logits, labels), by_hand)
        parts = (cross_entropy(logits[:2], labels[:2]) * 2 + cross_entropy(logits[2:], labels[2:]) * 4) / 6
        torch.testing.assert_close(parts, by_hand)
        torch.testing.assert_close(cross_entropy(logits, F.one_hot(labels).float()), by_hand)  # as mixup gives them
    torch.testing.assert_close(cross_entropy(logits, labels), F.cross_entropy(logits, labels))


def test_all_methods_take_their_cross_entropy_with_labels_from_there() -> None:
    files = [file for file in (Path(okdc.__file__).parent / "methods").rglob("*.py") if file.name != "__init__.py"]
    ways = (" cross_entropy(", "task.supervised(")
    own = [file for file in files if "shared" not in file.parts]
    learning = [file.stem for file in own if any(way in file.read_text() for way in ways)]
    assert len(learning) >= 16
    others = [file.name for file in files if "F.cross_entropy" in file.read_text() or "nll_loss" in file.read_text()]
    assert others == ["hsakd.py"]  # whose classes of turned images have no weights, as its card says


def test_a_method_of_ones_own_is_told_where_they_act(caplog: pytest.LogCaptureFixture) -> None:
    recipe = override(Recipe(), {"class_weights": "auto", "device": "cpu"})
    data: Any = SimpleNamespace(train_labels=torch.tensor([0, 1]), classes=NAMES, name="photos")
    class_weights.of(recipe, data)
    assert not caplog.records
    class_weights.of(replace(recipe, method={"name": "my_module:Mine"}), data)
    assert "--class-weights acts in okdc.losses.cross_entropy alone: my_module:Mine" in caplog.text


def test_they_act_in_a_compiled_step() -> None:
    logits, labels, weights = torch.randn(4, 2), torch.tensor([0, 1, 1, 0]), torch.tensor([0.5, 4.0])
    compiled = torch.compile(cross_entropy, backend="eager", fullgraph=True)
    for each in (None, weights, 2 * weights):
        with weighted(each):
            torch.testing.assert_close(compiled(logits, labels), cross_entropy(logits, labels))


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Forty grey images to two slightly brighter ones, in train/ and in val/."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, count, light in (("large", 40, 100), ("small", 2, 125)):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(light - 60, light + 60, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("method", ["baseline", "dml"])
def test_a_rare_class_is_found_with_weights_and_not_without(method: str, uneven: Path, tmp_path: Path) -> None:
    settings = {
        "model": "resnet20_cifar", "method": method, "data": str(uneven), "epochs": 4, "batch_size": 14, "lr": 0.02,
        "img_size": 16, "workers": 0, "no_aug": True, "onnx": False, "device": "cpu", "output": tmp_path, "seed": 1,
        "eval_metric": "balanced",
    }  # fmt: skip
    balanced = []
    for weights in (None, "auto"):
        result = okdc.compress(experiment=str(weights), class_weights=weights, **settings)
        assert result.recipe.train.class_weights == weights
        balanced.append(result.metrics["balanced"])
    assert balanced[1] > 90 > balanced[0]
