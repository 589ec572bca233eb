"""What a run says before its first epoch of steps that are larger than those of plain training."""

from __future__ import annotations

from typing import Any

import pytest

from okdc import methods, recipe
from okdc.measure import estimate
from okdc.pipeline import opening
from okdc.recipe import Recipe

# The gradients of the paper's four blocks are large, and clipped to 5 without the last setting.
STEEP = {"method": "ahbf", "extra_blocks": 4, "opt": "momentum", "lr": 0.05, "clip_grad": 0}


def hint(**typed: Any) -> str | None:
    typed = {"model": "resnet20_cifar", "img_size": 16, "num_classes": 10, **STEEP, **typed}
    asked = recipe.override(Recipe(), typed, methods.settings)
    return opening.steep(estimate.built(asked)[0], asked)


def test_losses_that_make_the_first_steps_large_are_told_with_what_to_type() -> None:
    told = hint()
    assert told and max(map(len, told.splitlines())) <= 79
    words = " ".join(told.split())
    assert "the losses of `ahbf` give the network a gradient" in words and "type a lower --lr than 0.05" in words
    assert float(words.partition("--clip-grad ")[2].partition(",")[0]) > 0


@pytest.mark.parametrize(
    "typed",
    [
        {"method": "baseline", "extra_blocks": None},
        {"method": "one", "extra_blocks": None},
        {"opt": "adamw"},
        {"clip_grad": 5.0},
        {"clip_grad": None},
    ],
    ids=str,
)
def test_nothing_is_said_where_steps_are_of_usual_size(typed: dict[str, Any]) -> None:
    assert hint(**typed) is None
