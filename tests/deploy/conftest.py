"""The bundle that tests of writing and of verifying share: written once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from okdc import deploy
from okdc.recipe import ExportSettings
from okdc.system import shipped
from tests.helpers.bundles import PREPROCESS, Images, export


@pytest.fixture(scope="session")
def data() -> Images:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (16, 32, 32, 3), dtype=np.uint8)
    raw = [(Image.fromarray(image), index % 4) for index, image in enumerate(pixels)]
    predict = shipped.load(shipped.folder("export") / "predict.py")
    images = torch.from_numpy(np.stack([predict.preprocess(image, PREPROCESS) for image, _ in raw]))
    return Images(list(zip(images.split(8), (torch.arange(16) % 4).split(8), strict=True)), raw)


@pytest.fixture(scope="session")
def student() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4).eval()


@pytest.fixture(scope="session")
def bundle(student: torch.nn.Module, data: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export"
    assert export(student, data, folder, ExportSettings(batch_sizes=[1], license="apache-2.0"))["verdict"] == "pass"
    return folder


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the bundle that a test may spoil; the bundle itself must stay as it is."""
    shutil.copytree(bundle, tmp_path / "export")
    yield tmp_path / "export"
    assert deploy.check_sums(bundle) == []
