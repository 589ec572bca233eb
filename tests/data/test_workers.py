"""Worker processes: ended by none but the main process, left behind by nobody, and noticed when they hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from okdc.data.streams import _read
from okdc.errors import DataError
from okdc.system.waiting import Stuck, Waiting
from tests.helpers.images import loaded, same, settings


def test_an_abandoned_epoch_leaves_nothing_behind(folder: Path) -> None:
    data = loaded(settings(folder, workers=2))
    expected = list(data.train.batches(1))
    next(data.train.batches(0))
    assert same(expected, data.train.batches(1))


def test_an_interrupt_is_left_to_the_main_process(folder: Path) -> None:
    data = loaded(settings(folder, workers=1))
    expected, batches = list(data.train.batches(0)), data.train.batches(0)
    first = next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGINT)  # as Ctrl-C does, which reaches the whole process group
    assert same(expected, [first, *batches])


@pytest.fixture(params=multiprocessing.get_all_start_methods())
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_none_but_the_main_process_ends_a_worker(folder: Path, start_method: str) -> None:
    data = loaded(settings(folder, workers=1))
    batches = data.train.batches(0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # as a scheduler does
    worker.join(0.5)
    assert worker.is_alive() and len(list(batches)) == 3
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_a_stream_that_breaks_off_is_told_from_a_worker_that_dies() -> None:
    def broken(words: str) -> Iterator[int]:
        yield 1
        raise RuntimeError(words)

    with pytest.raises(DataError, match=r"broke off: ValueError: too few shards.*-j 1"):
        list(_read(broken("Caught ValueError in DataLoader worker process 1.\nValueError: too few shards"), 0))
    with pytest.raises(RuntimeError, match="is killed by signal"):
        list(_read(broken("DataLoader worker (pid 12) is killed by signal: Killed."), 0))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("kind", ["images", "stream"])
def test_workers_that_hang_are_noticed_and_ended(folder: Path, request: pytest.FixtureRequest, kind: str) -> None:
    given = settings(folder, workers=1)
    if kind == "stream":
        shards = request.getfixturevalue("shards")
        splits = {"train_split": "train-{0..1}.tar|24", "val_split": "val-0.tar|9"}
        given = settings(f"wds/{shards}", class_map=str(shards / "classes.txt"), workers=1, **splits)
    with Waiting(5.0) as waiting:
        batches = waiting.over(loaded(given, batch_size=2).train.batches(0))
        next(batches)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGSTOP)
        with pytest.raises(Stuck):
            list(batches)
        assert multiprocessing.active_children() == [] and waiting.seconds > 5
