"""While files are written, what trained is gone, and so are the other processes: nothing keeps a GPU that waits."""

from __future__ import annotations

import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import okdc
from okdc import report, training
from tests.helpers.networks import Tiny
from tests.helpers.processes import finish, start

BATCHES = [(torch.randn(4, 3, 16, 16), torch.arange(4))] * 2
QUICK: dict[str, Any] = {"epochs": 1, "device": "cpu", "onnx": False, "img_size": 16}


def train(folder: Path) -> okdc.Result:
    return okdc.compress(Tiny(), BATCHES, BATCHES[:1], method="dml", output=folder, **QUICK)


def test_what_trained_is_gone_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    left: list[Any] = []
    fit, write = training.fit, report.write

    def noting(method: Any, *arguments: Any, **options: Any) -> Any:
        state = fit(method, *arguments, **options)
        made.extend((weakref.ref(method), weakref.ref(state), weakref.ref(state.optimizer)))
        return state

    def told(folder: Path, facts: dict[str, Any]) -> None:
        left.extend(each() for each in made)
        write(folder, facts)

    monkeypatch.setattr(training, "fit", noting)
    monkeypatch.setattr(report, "write", told)
    result = train(tmp_path)
    assert left == [None] * 3
    assert result.student(BATCHES[0][0]).shape == (4, 4)


@pytest.mark.ddp
def test_the_other_process_ends_while_the_first_one_writes(tmp_path: Path) -> None:
    first, second = start(str(tmp_path), file=__file__)
    assert second.wait(240) == 0, second.communicate()[0]
    assert first.poll() is None
    (tmp_path / "go on").touch()
    finish([first, second])
    assert first.returncode == 0 and list(tmp_path.glob("*/report.json"))


def be_process(folder: str) -> None:
    """One of two processes; the first one does not begin to report before the other has ended."""
    write = report.write

    def waiting(path: Path, facts: dict[str, Any]) -> None:
        while not Path(folder, "go on").exists():
            time.sleep(0.05)
        write(path, facts)

    report.write = waiting
    train(Path(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    be_process(*sys.argv[1:])
