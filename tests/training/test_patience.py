"""A run ends early where its student does not get better, exactly where it would have, also when it was resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import okdc
from okdc.errors import RecipeError, RunError
from tests.helpers.training import SETTINGS, Crash, assert_same_run, crash_at, run, tiny_data
from tests.report.test_confusion import plain, uneven
from tests.report.test_report import pages, sample, without_spaces

FROZEN = replace(SETTINGS, epochs=8, patience=2, lr=1e-12)  # nothing gets better, so the first epoch is the best


def test_it_stops_after_so_many_epochs_without_a_better_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = run(tmp_path, FROZEN)
    best = max(row["eval_top1"] for row in state.history)
    assert [row["eval_top1"] for row in state.history].index(best) == state.best_epoch
    assert len(state.history) == state.epoch == state.best_epoch + 1 + FROZEN.patience < FROZEN.epochs
    assert state.method.epochs == FROZEN.epochs  # ramps are as long as they were to be
    told = f"Stopped early after epoch {state.epoch} of 8: no better top1 than epoch {state.best_epoch + 1}'s for 2 epo"
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_it_stops_where_it_would_have_when_it_is_resumed(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", FROZEN)
    with pytest.raises(Crash):
        run(tmp_path / "cut", FROZEN, data=tiny_data(crash_at(whole.epoch - 1, 3)))
    resumed = run(tmp_path / "cut", FROZEN, resume=tmp_path / "cut" / "last.pth.tar")
    assert_same_run(whole, resumed, tmp_path / "whole", tmp_path / "cut")


def test_more_patience_goes_on_and_ends_as_without(tmp_path: Path) -> None:
    last = tmp_path / "run" / "last.pth.tar"
    stopped = run(tmp_path / "run", FROZEN)
    again = run(tmp_path / "run", FROZEN, resume=last)
    assert again.epoch == stopped.epoch  # nothing is left to do
    resumed = run(tmp_path / "run", replace(FROZEN, patience=20), resume=last)
    assert_same_run(
        run(tmp_path / "whole", replace(FROZEN, patience=None)), resumed, tmp_path / "whole", tmp_path / "run"
    )


def test_a_run_that_stopped_early_and_lost_its_best_says_how_to_go_on(tmp_path: Path) -> None:
    run(tmp_path, FROZEN)
    (tmp_path / "model_best.pth.tar").unlink()
    with pytest.raises(RunError, match=r"finished run whose model_best.* is gone.*larger --patience"):
        run(tmp_path, FROZEN, resume=tmp_path / "last.pth.tar")
    assert run(tmp_path, replace(FROZEN, patience=20), resume=tmp_path / "last.pth.tar").epoch == FROZEN.epochs


def test_without_validation_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    loader = uneven()
    with pytest.raises(RecipeError, match="--patience waits for a better validation, and there are no"):
        okdc.compress(plain(), loader, method="baseline", patience=3, onnx=False, device="cpu", output=tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_report_and_the_result_say_so(tmp_path: Path) -> None:
    loader = uneven()
    settings = {"method": "baseline", "epochs": 5, "patience": 1, "lr": 1e-12, "onnx": False, "device": "cpu"}
    result = okdc.compress(plain(), loader, loader, output=tmp_path, **settings)
    told = "after epoch 2 of 5: no better top1 than epoch 1's for 1 epoch"
    assert result.metrics["stopped_early"] == told and result.metrics["epochs"] == 2
    assert json.loads((result.path / "report.json").read_text())["metrics"]["stopped_early"] == told
    page, markdown = pages(tmp_path / "page", sample(metrics={"stopped_early": told, "top1": 90.0}))
    assert f"Stopped early {told}." in without_spaces(page.text) and f"stopped early {told}" in markdown
    torch.manual_seed(0)
    whole = okdc.compress(plain(), loader, loader, output=tmp_path, experiment="w", **settings | {"patience": 9})
    assert "stopped_early" not in whole.metrics
