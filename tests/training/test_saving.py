"""Checkpoints are written while training goes on: each the state of its moment, one at a time, and errors are said."""

from __future__ import annotations

import signal
import threading
import time
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

from okdc.errors import RunError
from okdc.training import checkpoint, saving
from okdc.training.saving import snapshot
from tests.helpers.training import SETTINGS, STEPS, Crash, Tiny, crash_at, network, run, same, tiny_data

EACH = replace(SETTINGS, recovery_interval=1)


@pytest.fixture
def slow_disk(monkeypatch):
    """Every file takes until the event is set, at most 10 seconds; the list has (file, thread, was it set)."""
    go_on, written, write, lock = threading.Event(), [], checkpoint.save, threading.Lock()

    def slowly(path, payload, keep=1):
        assert lock.acquire(blocking=False), "two files are written at a time"
        thread = threading.current_thread()
        came = thread is threading.main_thread() or go_on.wait(10)
        write(path, payload, keep)
        written.append((path.name, thread is threading.main_thread(), came))
        lock.release()

    monkeypatch.setattr(checkpoint, "save", slowly)
    return go_on, written


def assert_equal(one, other, where="") -> None:
    """But for times, two checkpoints hold the same."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            if key not in ("seconds", "images_per_second", "data_wait", "between", "waited"):
                assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert same(one, other), where


def test_training_goes_on_while_a_file_is_written_which_holds_the_state_of_before(tmp_path, slow_disk):
    go_on, written = slow_disk

    def before(epoch: int, index: int) -> None:
        if (epoch, index) == (1, STEPS - 1):  # the whole epoch was trained beside the file of the first one
            go_on.set()
            raise Crash

    with pytest.raises(Crash):
        run(tmp_path / "slow", replace(SETTINGS, model_ema=True), data=tiny_data(before))
    names = [checkpoint.LAST, checkpoint.BEST, checkpoint.LAST]
    assert written == list(zip(names, (True, False, False), (True, True, True)))
    with pytest.raises(Crash):
        run(tmp_path / "quick", replace(SETTINGS, model_ema=True), data=tiny_data(crash_at(1, 0)))
    for name in (checkpoint.LAST, checkpoint.BEST):
        assert_equal(checkpoint.load(tmp_path / "quick" / name), checkpoint.load(tmp_path / "slow" / name))


def test_a_signal_waits_for_what_is_being_written_and_saves_after_it(tmp_path, slow_disk):
    go_on, written = slow_disk

    def before(epoch: int, index: int) -> None:
        if (epoch, index) == (1, 2):
            signal.raise_signal(signal.SIGTERM)
            threading.Timer(0.2, go_on.set).start()

    with pytest.raises(SystemExit, match="143"):
        run(tmp_path, data=tiny_data(before))
    assert [main for _, main, _ in written] == [True, False, False, True]
    saved = checkpoint.load(tmp_path / checkpoint.LAST)["okdc"]["run"]
    assert (saved["epoch"], saved["step"]) == (1, 3)


def test_a_disk_that_fails_is_said_at_the_next_step(tmp_path, monkeypatch):
    asked, write = [], checkpoint.save

    def before(epoch: int, index: int) -> None:
        asked.append((epoch, index))
        while len(threading.enumerate()) > threads:
            time.sleep(0.01)

    def full(path, payload, keep=1):
        write(path if threading.current_thread() is threading.main_thread() else path / "gone", payload, keep)

    threads = len(threading.enumerate())
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(RunError, match=r"could not write .*gone: .*No such file.*--resume auto"):
        run(tmp_path, data=tiny_data(before))
    assert asked[-1] == (1, 0) and len(threading.enumerate()) == threads
    assert checkpoint.load(tmp_path / checkpoint.LAST)["okdc"]["run"]["epoch"] == 0


def test_an_error_of_the_last_file_is_said_at_the_end(tmp_path, monkeypatch, caplog):
    def fails(files):
        raise RunError("could not write")

    monkeypatch.setattr(saving, "write", fails)
    with pytest.raises(RunError, match="could not write"):
        run(tmp_path, replace(SETTINGS, epochs=1))
    with pytest.raises(Crash):  # what ended the run is what is said; the other is not lost
        run(tmp_path / "other", EACH, data=tiny_data(crash_at(0, 1)))
    assert "could not write" in caplog.text


def test_where_memory_is_short_training_waits_for_the_disk(tmp_path, slow_disk, monkeypatch):
    _, written = slow_disk
    monkeypatch.setattr("okdc.system.memory.free", lambda: 1000)
    run(tmp_path, replace(SETTINGS, epochs=1))
    assert written == [(name, True, True) for name in (checkpoint.LAST, checkpoint.BEST, checkpoint.LAST)]


def test_a_copy_holds_each_memory_once_and_nothing_of_the_original(tmp_path):
    method = Tiny(network())
    state, bank = method.state_dict(), torch.arange(12.0)
    values = {
        "all": state, "target": method.cohort.target.state_dict(), "rows": [bank.view(3, 4).t(), bank[3:5]],
        "odd": (torch.tensor([1 + 2j]).conj(), torch.empty(0), nn.Parameter(torch.ones(2))), "words": {"a": [1, None]},
        "half": torch.ones(3, dtype=torch.bfloat16),
    }  # fmt: skip
    found = snapshot(values)
    torch.save(values, tmp_path / "values"), torch.save(found, tmp_path / "found")
    sizes = [(tmp_path / name).stat().st_size for name in ("values", "found")]
    assert abs(sizes[0] - sizes[1]) < 1024  # what shares memory shares it again
    expected = torch.load(tmp_path / "values", weights_only=True)
    with torch.no_grad():
        for tensor in (bank, values["odd"][2], *method.parameters()):
            tensor.fill_(9)
    values["words"]["a"].append(2)
    assert_equal(expected, found)
    assert type(found["all"]) is OrderedDict and found["all"]._metadata == state._metadata
    assert found["rows"][0].stride() == (1, 4) and isinstance(found["odd"][2], nn.Parameter)
    assert torch.equal(snapshot([torch.eye(2).to_sparse()])[0].to_dense(), torch.eye(2))
