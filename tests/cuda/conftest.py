"""`pytest -m cuda`: what only a GPU can show; the same tests run on the CPU where OKDC_CUDA_TESTS_ON=cpu says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from okdc.errors import RecipeError
from okdc.training.machine import choose_device

ASKED = os.environ.get("OKDC_CUDA_TESTS_ON", "cuda")  # or cuda:1, or cpu to try the tests themselves


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            # Whoever has a GPU has other versions of Python and torch than CI, with warnings of their own.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def device() -> torch.device:
    try:
        return choose_device(ASKED)
    except RecipeError as error:
        pytest.skip(str(error))


@pytest.fixture
def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
