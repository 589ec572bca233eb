"""A small bundle to export and verify: a network of four colours, and sixteen images of noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from okdc import deploy
from okdc.deploy.bundle import write_sums
from okdc.recipe import ExportSettings

PREPROCESS = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.25),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
CLASSES = ("red", "green", "blue", "grey")
QUICK = ExportSettings(batch_sizes=[])
WEIGHTS_ONLY = ExportSettings(onnx=False, batch_sizes=[])  # for tests of the folder, not of the files in it


@dataclass(frozen=True)
class Images:
    """Validation data as okdc.data makes it."""

    validation: Any
    validation_images: Any
    classes: tuple[str, ...] = CLASSES
    preprocess: dict[str, Any] = field(default_factory=lambda: dict(PREPROCESS))
    name: str = "/some/where/colours"
    sizes: tuple[int, int] = (0, 16)


def export(student: torch.nn.Module, data: Any, folder: Path, settings: ExportSettings = QUICK, **more: Any) -> dict:
    info = {"command": f"okdc compress --data {folder}", "recipe": {"data": {"data": str(folder)}}, "metrics": {}}
    return deploy.export_bundle(student, data, settings, folder, **{"arch": "test_resnet", "info": info} | more)


def perturb(folder: Path) -> None:
    """Change the weights inside model.onnx a little, and the check sums with them."""
    model = onnx.load(folder / "model.onnx")
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(values * np.float32(1.01), tensor.name))
    onnx.save(model, folder / "model.onnx")
    write_sums(folder)
