"""Reads the vectors that the authors' own code gave (tests/golden), in float64, and keeps count of the comparisons."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "golden"

# What was compared in this process, by the test file that asked: the golden files read, and each relative error.
files: dict[str, set[str]] = {}
errors: dict[str, list[float]] = {}


def load(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors, floats as float64, and the metadata of one golden file."""
    files.setdefault(_asker(), set()).add(name)
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}, meta


def assert_same(got: Tensor, expected: Tensor | float, tolerance: float = 1e-6) -> None:
    """Equal to within `tolerance` of the largest expected value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    worst = (got.detach().double() - expected).abs().max()
    error = float(worst) / max(1e-3, float(expected.abs().max()))
    errors.setdefault(_asker(), []).append(error)
    assert error <= tolerance, f"differs by {worst:.2e}, {error:.1e} of the largest expected value"


def _asker() -> str:
    """The method whose test runs: `tests/methods/test_ffl.py::... (call)` is ffl."""
    return Path(os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]).stem.removeprefix("test_")
