"""Numbers that somebody else's code gave: read in float64, and compared by relative error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def load(path: str | Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a safetensors file, floats as float64, and what its metadata has under `meta` (JSON), or None."""
    with safe_open(path, "pt") as file:
        meta = (file.metadata() or {}).get("meta")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    as_double = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
    return as_double, None if meta is None else json.loads(meta)


def assert_same(got: Tensor, expected: Tensor | float, tolerance: float = 1e-6) -> float:
    """The error relative to the largest expected value; AssertionError where it is more than `tolerance`."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    worst = (got.detach().double() - expected).abs().max()
    error = float(worst) / max(1e-3, float(expected.abs().max()))
    assert error <= tolerance, f"differs by {worst:.2e}, {error:.1e} of the largest expected value"
    return error
