"""What is shown while a run trains: lines or a bar, the time that is left, and the time spent waiting for data."""

from __future__ import annotations

import csv
import os
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from okdc.training.loop import _tell_idle
from okdc.training.progress import Display, faster_data
from okdc.training.state import TrainState
from tests.helpers.training import (
    SETTINGS,
    STEPS,
    Crash,
    Tiny,
    crash_at,
    run,
    tiny_data,
)


def test_the_time_that_is_left_does_not_count_on_waiting_for_a_first_batch_each_step(tmp_path):
    left = []

    def late(epoch, index):
        if (epoch, index) == (0, 0):
            time.sleep(0.5)

    class Told(Display):
        def step(self, epoch, step, losses, lr, speed, seconds):
            left.append(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("okdc.training.loop.Display", Told)
        run(tmp_path, data=tiny_data(late))
    assert left[0] < 0.5 * (STEPS * SETTINGS.epochs - 1) / 2


def test_a_first_step_that_compiles_is_not_taken_for_the_pace():
    run: Any = SimpleNamespace(settings=replace(SETTINGS, epochs=2), steps=100)
    state: Any = SimpleNamespace(epoch=0, step=3, between=0.0, late=60.0)
    state.sums = {"seconds": 61.0, "steps": 2, "skipped": 1, "waited": 1.0}
    assert TrainState.seconds_left(state, run) == pytest.approx(0.5 * 197)


class Slow(list):
    """Validation batches that take their time."""

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.12)
            yield batch


@pytest.mark.parametrize("resumed", [False, True])
def test_the_time_left_is_right_at_half_of_the_steps(tmp_path, monkeypatch, resumed):
    seen = {}

    class Noting(Display):
        def step(self, epoch: int, step: int, losses, lr: float, speed: float, left: float) -> None:
            seen[epoch, step] = time.perf_counter(), left

    clock = [0.0]  # on which only sleeping takes time, whatever else the machine does

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("okdc.training.loop.Display", Noting)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    settings, middle = replace(SETTINGS, epochs=4, recovery_interval=1), (2, 1)

    def data(before=lambda *position: None) -> SimpleNamespace:
        slow = tiny_data(lambda *position: (before(*position), time.sleep(0.06)))
        slow.validation = Slow(slow.validation)
        return slow

    if resumed:
        with pytest.raises(Crash):
            run(tmp_path, settings, data=data(crash_at(1, 4)))
    run(tmp_path, settings, data=data(), resume=tmp_path / "last.pth.tar" if resumed else None)
    then, left = seen[middle]
    assert left == pytest.approx(clock[0] - then, rel=0.02) and left > 1


def test_the_time_spent_waiting_for_data_is_shown_with_advice(tmp_path, capsys):
    recipe = {"data": {"data": "images", "workers": 0}, "train": {"epochs": 2}}
    slow = tiny_data(lambda *_: time.sleep(0.1))
    state = run(tmp_path, replace(SETTINGS, epochs=2), data=slow, recipe=recipe)
    told = capsys.readouterr().err
    assert all(50 < row["data_wait"] <= 100 for row in state.history)
    assert f"data wait {state.history[0]['data_wait']:.0f} %" in told and told.count("-j ") == 1
    with open(tmp_path / "summary.csv", newline="") as file:
        assert [float(row["data_wait"]) for row in csv.DictReader(file)] == [r["data_wait"] for r in state.history]
    slow.train.resident = True
    run(tmp_path / "resident", replace(SETTINGS, epochs=1), data=slow, recipe=recipe)
    assert "kept decoded already" in capsys.readouterr().err
    method = Tiny()
    method.after_step = lambda batches: time.sleep(0.05)
    state = run(tmp_path / "quick", replace(SETTINGS, epochs=1), method=method, recipe=recipe)
    assert state.history[0]["data_wait"] < 10 and "-j " not in capsys.readouterr().err


def test_advice_for_whoever_waits_for_data_is_what_helps():
    cores = os.cpu_count() or 1
    assert "(num_workers=N)" in faster_data({"data": {"data": "loader", "workers": 0}})
    assert "--resident auto" in faster_data({"data": {"data": "images", "workers": 0, "resident": "off"}})
    assert f"-j {min(cores, 2)}." in faster_data({"data": {"data": "images", "workers": 0}}) or cores == 1
    assert "--aa" in faster_data({"data": {"data": "images", "workers": cores}})
    assert "(-b)" in faster_data({"data": {"data": "images", "workers": 0}}, resident=True)


def test_lines_are_printed_where_there_is_no_terminal(tmp_path, capsys):
    run(tmp_path, replace(SETTINGS, epochs=1, log_interval=4))
    lines = capsys.readouterr().err.splitlines()
    told = [line.split(" loss")[0] for line in lines if "waited for data" not in line]  # said on a busy machine
    assert told == ["epoch 1/1 step 4/6", "epoch 1/1:"]
    assert "ce" in lines[0] and "images/s" in lines[0] and "left" in lines[0]
    assert "Acc@1" in lines[1] and "branch1" in lines[1] and "ensemble" in lines[1]
    assert "Acc@5" not in lines[1] and "target" not in lines[1]  # of three classes; and Acc@1 is the target's


def test_no_time_left_is_told_by_a_first_step(capsys):
    display = Display(2, 4, 1)
    for step, left in ((1, 3 * 86_400.0), (2, 50.0)):
        display.step(0, step, {"ce": 1.0}, 0.1, 10.0, left)
    first, second = capsys.readouterr().err.splitlines()
    assert "days" not in first and "left" not in first and "0:00:50 left" in second


def test_a_loss_that_was_zero_in_every_step_is_told(caplog):
    rows = [{"loss/ce": 1.0, "loss/kl": 0.0, "loss/late": 0.0}, {"loss/ce": 0.0, "loss/kl": 0.0, "loss/late": 0.5}]
    _tell_idle(SimpleNamespace(history=rows, method=object()))
    assert [record.getMessage().split(" was 0")[0] for record in caplog.records] == ["the loss kl of object"]


def test_a_network_alone_is_no_ensemble(capsys):
    display = Display(2, 4, 50)
    row = {"epoch": 0, "train_loss": 1.0, "skipped_steps": 0, "seconds": 1.0, "data_wait": 0.0}
    row |= {"eval_top1": 50.0, "eval_top5": 90.0, "eval_balanced": 50.0, "top1/target": 50.0, "top1/ensemble": 50.0}
    display.epoch(row)
    said = capsys.readouterr().err
    assert "Acc@1 50.000 Acc@5 90.000" in said and "ensemble" not in said and "target" not in said


def test_on_a_narrow_terminal_the_line_of_an_epoch_ends_between_two_figures():
    display = Display(2, 4, 50)
    line = "epoch 1/2: loss 2.3 · Acc@1 50.000 Acc@5 90.000 · top-1 of branch1 40.00 · 1.0 s · data wait 0 %"
    assert display._folded(line) == line, "not in a log"
    display.console = Console(force_terminal=True, width=60)
    first, second = display._folded(line).splitlines()
    assert first.endswith("Acc@5 90.000 ·") and second == "  top-1 of branch1 40.00 · 1.0 s · data wait 0 %"


def test_a_bar_is_drawn_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    run(tmp_path, replace(SETTINGS, epochs=2))
    text = capsys.readouterr().err
    assert "1/2" in text and "━" in text and "images/s" in text and "epoch 2/2: loss" in text
    assert text.endswith("\x1b[?25h")  # the cursor is given back


@pytest.mark.parametrize(("seconds", "told_after"), [(1e9, 20), (0.0, 2)])
def test_a_long_run_says_once_how_long_it_takes(
    seconds: float, told_after: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("okdc.training.progress.ENOUGH_SECONDS", seconds)
    display = Display(2, 100, 1000)
    for step in range(1, 41):
        display.step(0, step, {"ce/target": 1.0}, 0.1, 10.0, left=3600.0)
        assert capsys.readouterr().err.count("About 1:00:00 to go") == (step == told_after)
