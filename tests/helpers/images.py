"""Small images in folders, the data made of them, and what tests ask of such data."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from okdc.data import Data, load, open_source
from okdc.errors import DataError
from okdc.recipe import DataSettings

CONFIG = {
    "input_size": (3, 16, 16),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def settings(path: Path | str, **changes: Any) -> DataSettings:
    return replace(DataSettings(data=str(path), workers=0, resident="off"), **changes)  # test_resident.py has the rest


def write(path: Path, color: int = 0, mode: str = "RGB", size: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient = np.linspace(0, 200, size * size, dtype=np.uint8).reshape(size, size) + np.uint8(color)
    Image.fromarray(gradient).convert(mode).save(path)
    return path


def write_split(folder: Path, count: int = 6, classes: tuple[str, ...] = ("cat", "dog", "10", "9")) -> Path:
    for number, name in enumerate(classes):
        for i in range(count):
            write(folder / name / f"{i}.png", 10 * number + i)
    return folder


def loaded(given: DataSettings, batch_size: int = 5, config: dict[str, Any] = CONFIG, seed: int = 7) -> Data:
    source = open_source(given, seed)
    return load(source, given, config, batch_size=batch_size, validation_batch_size=4, seed=seed, device="cpu")


def same(left: Any, right: Any) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(x1, x2) and torch.equal(y1, y2) for (x1, y1), (x2, y2) in zip(left, right)
    )


def generator_states() -> tuple[Any, ...]:
    numpy_state: Any = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist()


def fails(given: DataSettings, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(given, 0)
    for word in words:
        assert word in str(caught.value)


def corrupt(*paths: Path) -> None:
    for path in paths:
        path.write_bytes(path.read_bytes()[:60])
