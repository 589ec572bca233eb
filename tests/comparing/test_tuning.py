"""Which learning rate an arm gets, by what the runs of a grid say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from okdc.comparing.arms import Arm
from okdc.comparing.running import Job
from okdc.comparing.tuning import tuned
from okdc.errors import TrainingError
from okdc.recipe import Recipe, override

PLAIN = Arm("baseline", override(Recipe(), {"method": "baseline", "lr": 0.03, "data": "digits"}))


def chosen(judged: dict[float, tuple[float, float | None] | None], folder: Path) -> tuple[float, set[float]]:
    """The rate of plain training and those tried, where runs end with such a top-1 and loss; None: with neither."""
    tried = set()

    def run(jobs: Sequence[Job]) -> None:
        for job in jobs:
            rate = job.recipe.train.lr
            tried.add(rate)
            top1, loss = judged[rate] or (None, None)
            job.folder.mkdir(parents=True)
            (job.folder / "report.json").write_text(json.dumps({"history": [{"eval_top1": top1, "eval_loss": loss}]}))

    [arm] = tuned([PLAIN], 0.5, folder, run)
    return arm.recipe.train.lr, tried


def test_of_equal_scores_the_smaller_loss_decides(tmp_path: Path) -> None:
    grid = {0.01: (62.0, 1.24), 0.03: (62.0, 1.75), 0.09: (31.0, 3.0), 0.00333: (40.0, 1.1)}
    assert chosen(grid, tmp_path) == (0.01, set(grid))


def test_of_equal_scores_and_losses_the_rate_that_was_asked_for(tmp_path: Path) -> None:
    assert chosen({0.01: (62.0, None), 0.03: (62.0, None), 0.09: (62.0, None)}, tmp_path)[0] == 0.03


def test_the_grid_grows_where_its_best_rate_is_at_an_end(tmp_path: Path) -> None:
    up = {0.01: (1.0, 3.0), 0.03: (2.0, 2.0), 0.09: (3.0, 1.0), 0.27: (4.0, 0.5), 0.81: None}
    assert chosen(up, tmp_path) == (0.27, set(up))


def test_that_no_rate_trains_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none of the learning rates 0.00111, 0.00333, 0.01, 0.03, 0.09"):
        chosen(dict.fromkeys((0.00111, 0.00333, 0.01, 0.03, 0.09)), tmp_path)
