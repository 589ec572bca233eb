"""Data that do not come end the run, with what was done saved."""

from __future__ import annotations

import multiprocessing
import signal
import time
from dataclasses import replace

import pytest
import torch

from okdc.data import wrap
from okdc.errors import DataError, TrainingError
from okdc.training import checkpoint
from okdc.training.state import save
from tests.helpers.training import (
    CLASSES,
    SETTINGS,
    Tiny,
    run,
)


class Sleepy(torch.utils.data.Dataset):
    """Images of which one is never there, in the process that loads it."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int):
        time.sleep(1000 if index == 20 else 0)
        return torch.zeros(3, 8, 8), index % CLASSES


class TwoOfThree(list):
    """Three batches, of which only two come."""

    def __iter__(self):
        yield from self[:2]
        time.sleep(1000)


OWN_LOADERS = {
    "iterable": lambda: TwoOfThree([(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64))] * 3),
    "no workers": lambda: torch.utils.data.DataLoader(Sleepy(), 8),
    "a worker": lambda: torch.utils.data.DataLoader(Sleepy(), 8, num_workers=1),
}


@pytest.mark.parametrize("loader", OWN_LOADERS)
def test_a_loader_of_the_users_that_hangs_is_an_error(tmp_path, loader):
    data, began = wrap(OWN_LOADERS[loader](), num_classes=CLASSES), time.perf_counter()
    with pytest.raises(
        TrainingError, match=r"no data came for 3 seconds, in step 3 of epoch 1; what was done is saved"
    ):
        run(tmp_path, replace(SETTINGS, timeout=3.0), data=data)
    assert time.perf_counter() - began < 60 and multiprocessing.active_children() == []
    assert checkpoint.load_run(tmp_path / "last.pth.tar")["okdc"]["run"]["step"] == 2
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_an_alarm_that_rings_late_does_not_disturb_the_saving(tmp_path, monkeypatch):
    method = Tiny()

    def late(batches):
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        time.sleep(10)

    def slowly(state, run):
        time.sleep(0.3)
        save(state, run)

    method.after_step = late
    monkeypatch.setattr("okdc.training.lost_data.save", slowly)
    with pytest.raises(TrainingError, match="no data came for 60 seconds"):
        run(tmp_path, replace(SETTINGS, timeout=60.0), method=method)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_what_a_worker_raises_is_not_taken_for_its_death(tmp_path):
    class Broken(Sleepy):
        def __getitem__(self, index: int):
            raise RuntimeError("no such image")

    data = wrap([(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64))], num_classes=CLASSES)
    data.train.loader = torch.utils.data.DataLoader(Broken(), 8, num_workers=1)
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker"):
        run(tmp_path, data=data)


def test_a_loader_that_hangs_when_it_is_first_looked_at_is_an_error():
    with pytest.raises(DataError, match=r"for 0\.3 seconds while looking at batch 3 of the training loader.*--timeout"):
        wrap(OWN_LOADERS["iterable"](), timeout=0.3)  # without num_classes, which it counts in all labels
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
