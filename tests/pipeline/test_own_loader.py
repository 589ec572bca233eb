"""A loader of one's own on the whole road: its bundle states what is known of the preprocessing, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import transforms as v1

import okdc
from okdc import deploy, pipeline
from okdc.cli import main
from okdc.deploy.bundle import read_json
from okdc.errors import DataError, ExportError, RecipeError
from okdc.pipeline import Result
from okdc.recipe import Recipe, override

SHADES = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [120, 120, 120]])
QUICK = {"method": "baseline", "epochs": 2, "opt": "adamw", "lr": 0.01, "batch_sizes": []}


def pictures(seed: int) -> list[tuple[Image.Image, int]]:
    """Noisy images of four colours, class by class."""
    noise = np.random.default_rng(seed).integers(-50, 50, (40, 40, 40, 3))
    return [(Image.fromarray((SHADES[i // 10] + noise[i]).clip(0, 255).astype(np.uint8)), i // 10) for i in range(40)]


class Colours(Dataset):
    def __init__(self, transform: Any, seed: int = 0) -> None:
        self.images, self.transform = pictures(seed), transform
        self.targets = [label for _, label in self.images]
        self.classes = ["red", "green", "blue", "grey\u2028or\x85gray"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        return self.transform(image) if self.transform else image, label


def loaders(*last: Any) -> tuple[DataLoader, DataLoader]:
    transform = v1.Compose([v1.Resize(32), v1.ToTensor(), *last])
    return (
        DataLoader(Colours(transform), batch_size=8, shuffle=True),
        DataLoader(Colours(transform, 1), batch_size=8),
    )


def normal(image: torch.Tensor) -> torch.Tensor:
    return (image - 0.45) / 0.25


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return okdc.compress("test_resnet", *loaders(normal), output=tmp_path_factory.mktemp("runs"), **QUICK)


def predicted(bundle: Path, tmp_path: Path) -> list[str]:
    for place, (image, _) in enumerate(pictures(1)):
        image.save(tmp_path / f"{place:03}.png")
    command = [sys.executable, "-W", "error", str(bundle / "predict.py"), str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line)["predictions"][0]["label"] for line in done.stdout.split("\n")[:-1]]


def test_of_what_is_unknown_the_bundle_says_nothing(unknown: Result, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = unknown.path / "export"
    assert unknown.verification and unknown.verification["verdict"] == "pass"
    assert not (bundle / "predict.py").exists() and not (bundle / "preprocess.json").exists()
    assert not (bundle / "requirements.txt").exists()
    config = read_json(bundle / "config.json")["pretrained_cfg"]
    assert not {"mean", "std", "interpolation", "crop_pct", "crop_mode"} & set(config)
    assert config["input_size"] == [3, 32, 32]
    notes = {entry.key: entry.value for entry in onnx.load(bundle / "model.onnx").metadata_props}
    assert json.loads(notes["okdc.preprocess"]) == {"input_size": [3, 32, 32]}
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert "not stated in this bundle" in card and "predict.py" not in card.split("## Files")[1].split("## ")[0]
    assert not any(line.startswith(("- mean", "- std", "- interpolation")) for line in card.split("\n"))
    assert {"target": "predict.py", "reason": deploy.UNKNOWN} in unknown.verification["skipped"]
    for name in ("report.md", "report.html"):
        report = (unknown.path / name).read_text(encoding="utf-8")
        assert "--mean R,G,B" in report and "python" not in report.split("Say how its images are prepared")[1][:200]
    assert timm.create_model(f"local-dir:{bundle}", pretrained=True).num_classes == 4
    assert deploy.read(bundle) == {
        "architecture": "test_resnet", "preprocess": {"input_size": [3, 32, 32]},
        "classes": ("red", "green", "blue", "grey\u2028or\x85gray"),
    }  # fmt: skip
    assert pipeline.verify(bundle, batch_sizes=[])["verdict"] == "parity_only"


def test_what_to_give_is_the_last_line(unknown: Result) -> None:
    words = ["--no-onnx", "--batch-sizes", "", "--output", str(unknown.path / "x")]
    done = CliRunner().invoke(main, ["export", str(unknown.path), *words])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip().split("\n")[-1] == f"Next: okdc export {unknown.path} --mean R,G,B --std R,G,B"


def test_images_are_not_prepared_by_guesswork(unknown: Result, tmp_path: Path) -> None:
    for label, name in enumerate(unknown.data.classes[:3]):
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            for place, (image, _) in enumerate(pictures(1)[10 * label : 10 * label + 2]):
                image.save(tmp_path / split / name / f"{place}.png")
    with pytest.raises(ExportError, match="cannot be prepared for this student: its preprocessing is unknown"):
        pipeline.verify(unknown.path, data=str(tmp_path))


def test_what_is_said_afterwards_makes_predict_work(unknown: Result, tmp_path: Path) -> None:
    said = {"mean": [0.45], "std": [0.25], "crop_pct": 1.0, "interpolation": "bilinear"}
    best = unknown.student(torch.stack([normal(v1.ToTensor()(v1.Resize(32)(image))) for image, _ in pictures(1)]))
    expected = [unknown.data.classes[index] for index in best.argmax(1)]
    words = ["--mean", "0.45", "--std", "0.25", "--crop-pct", "1", "--no-onnx", "--output", str(tmp_path / "typed")]
    done = CliRunner().invoke(main, ["export", str(unknown.path), *words, "--batch-sizes", ""])
    assert done.exit_code == 0 and "Next" not in done.stdout, done.output
    assert read_json(tmp_path / "typed" / "preprocess.json")["mean"] == [0.45] * 3
    assert "- interpolation: bilinear (assumed" in (tmp_path / "typed" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "images").mkdir()
    again = okdc.export(unknown.path / "export", output=tmp_path / "moved", onnx=False, batch_sizes=[], **said)
    assert again["verdict"] == "parity_only"
    assert read_json(tmp_path / "moved" / "preprocess.json")["mean"] == [0.45] * 3
    with pytest.raises(DataError, match="moved was trained with"):
        okdc.export(tmp_path / "moved", output=tmp_path / "more", batch_sizes=[], mean=[0.5], std=[0.5])
    with pytest.raises(DataError, match="goes from 0 to 1"):
        unknown.export(mean=[0.0], std=[1.0])
    verification = unknown.export(batch_sizes=[], **said)
    rows = {row["name"]: row for row in verification["rows"]}
    assert verification["verdict"] == "pass" and rows["predict.py"]["agreement"] == 100, "on the loader's raw images"
    assert predicted(unknown.path / "export", tmp_path / "images") == expected


def test_what_is_said_from_the_start_is_in_the_run(tmp_path: Path) -> None:
    said: dict[str, Any] = {"mean": [0.45], "std": [0.25], "crop_pct": 1.0, "interpolation": "bilinear"}
    quick = QUICK | said | {"epochs": 1, "onnx": False}
    result = okdc.compress("test_resnet", *loaders(normal), output=tmp_path, **quick)
    assert read_json(result.path / "student.json")["preprocess"]["std"] == [0.25] * 3
    assert result.recipe.data.mean == [0.45] and result.data.validation_images is not None
    for wrong, words in [({"mean": [0.1]}, "std not given"), ({"img_size": 64}, "img_size is 64")]:
        with pytest.raises(DataError, match=words):
            okdc.compress("test_resnet", *loaders(normal), output=tmp_path, **QUICK | wrong)
    with pytest.raises(RecipeError, match="hflip cannot act on a loader"):
        okdc.compress("test_resnet", *loaders(normal), output=tmp_path, hflip=0.0, **QUICK)


def test_a_plain_transform_needs_nothing_said(tmp_path: Path) -> None:
    recipe = override(Recipe(), {"mean": [0.9], "std": [0.1]})  # says what is done to the data of that recipe
    normalise = v1.Normalize([0.45] * 3, [0.25] * 3)
    result = okdc.compress("test_resnet", *loaders(normalise), output=tmp_path, recipe=recipe, images=12, **QUICK)
    assert result.verification is not None and result.verification["verdict"] == "pass"
    rows = {row["name"]: row for row in result.verification["rows"]}
    assert rows["predict.py"]["agreement"] == 100 and rows["predict.py"]["pass"]
    sample = result.verification["sample"]
    assert sample is not None and sample["told"] == "12 of 40 images, 3 of each class, seed 0"
    bundle = result.path / "export"
    assert sample["told"] in (bundle / "README.md").read_text(encoding="utf-8")
    assert sample["told"] in (result.path / "report.md").read_text(encoding="utf-8")
    assert read_json(bundle / "preprocess.json") == {
        "input_size": [3, 32, 32], "mean": [0.45] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0,
        "crop_mode": "center",
    }  # fmt: skip
    images = torch.stack([v1.Compose([v1.Resize(32), v1.ToTensor(), normalise])(image) for image, _ in pictures(1)])
    (tmp_path / "images").mkdir()
    with torch.no_grad():
        expected = [result.data.classes[index] for index in result.student(images).argmax(1)]
    assert predicted(bundle, tmp_path / "images") == expected
