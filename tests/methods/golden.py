"""Reads the vectors that the authors' own code gave (tests/golden), in float64, and keeps count of the comparisons."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from okdc.testing import golden

FOLDER = Path(__file__).parents[1] / "golden"

# What was compared in this process, by the test file that asked: the golden files read, and each relative error.
files: dict[str, set[str]] = {}
errors: dict[str, list[float]] = {}


def load(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors, floats as float64, and the metadata of one golden file."""
    files.setdefault(_asker(), set()).add(name)
    return golden.load(FOLDER / f"{name}.safetensors")


def assert_same(got: Tensor, expected: Tensor | float, tolerance: float = 1e-6) -> None:
    """Equal to within `tolerance` of the largest expected value."""
    errors.setdefault(_asker(), []).append(golden.assert_same(got, expected, tolerance))


def _asker() -> str:
    """The method whose test runs: `tests/methods/test_ffl.py::... (call)` is ffl."""
    return Path(os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]).stem.removeprefix("test_")
