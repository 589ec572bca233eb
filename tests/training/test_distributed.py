"""Several processes are one: the same weights of every method, and one voice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn

from okdc.ranks import rank
from okdc.training.launch import joined
from okdc.training.parallel import synchronised
from tests.helpers.processes import (
    CASES,
    SETTINGS,
    finish,
    start,
    train,
)


@pytest.mark.parametrize("steps", [2, pytest.param(10, marks=pytest.mark.ddp)])
def test_two_processes_give_the_weights_of_one(tmp_path, one_thread, steps):
    processes = start(str(tmp_path), str(steps), file=__file__)
    outputs = finish(processes, 900)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    rows, far = [], []
    for case in CASES:
        alone = train(case, steps, tmp_path / case / "alone")
        first, second = (torch.load(tmp_path / f"{case}.{i}.pt") for i in range(2))
        assert all(torch.equal(value, second["tensors"][name]) for name, value in first["tensors"].items()), case
        assert first["tensors"].keys() == alone["tensors"].keys()
        apart = {
            name: (value.double() - first["tensors"][name].double()).abs().max().item()
            for name, value in alone["tensors"].items()
            if value.numel()
        }
        worst = max(apart, key=lambda name: apart[name])
        rows.append(f"{case:16} {apart[worst]:.1e}  {worst}")
        if apart[worst] > 1e-5:
            far.append(rows[-1])
        for mine, theirs in zip(alone["history"], first["history"], strict=True):
            names = [name for name, value in mine.items() if name not in TIMES and value is not None]
            assert [theirs[n] for n in names] == pytest.approx([mine[n] for n in names], rel=1e-6, abs=1e-6), case
    print(f"\nlargest difference after {2 * steps} steps, two processes and one:\n" + "\n".join(rows))
    assert not far


TIMES = ("seconds", "images_per_second", "data_wait")


def train_all(folder: str, steps: str) -> None:
    with joined(SETTINGS):
        for case in CASES:
            torch.save(train(case, int(steps), Path(folder, case)), Path(folder, f"{case}.{rank()}.pt"))


def test_batch_norm_is_synchronised_and_given_back_but_for_the_users_own(monkeypatch):
    monkeypatch.setattr("okdc.training.parallel.world", lambda: 2)
    norms = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4), nn.SyncBatchNorm(4), SyncBatchNormAct(4))
    kinds = [type(norm) for norm in norms]
    with synchronised(norms, True):
        assert [type(norm) for norm in norms] == [nn.SyncBatchNorm, SyncBatchNormAct] * 2
    assert [type(norm) for norm in norms] == kinds
    assert [hasattr(norm, "process_group") for norm in norms] == [False, False, True, True]


RECIPE = """
network: {model: resnet20_cifar, img_size: 16}
method: {name: dml}
data: {data: digits, workers: 0}
train: {epochs: 1, batch_size: 8, validation_batch_size: 64, device: cpu, devices: 4}
export: {onnx: false}
"""


@pytest.mark.ddp
def test_the_command_line_trains_with_four_processes_and_goes_on_with_two(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    first = okdc("--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path), "--experiment", "run")
    told = " ".join(first.stderr.split())
    assert "32 images per step" in told and "4 processes on cpu" in told and told.count("epoch 1/1:") == 1
    facts = json.loads((tmp_path / "run" / "report.json").read_text())
    assert facts["environment"]["images per step"] == 32 and facts["environment"]["processes"] == "4 per node, 1 node"
    assert len(facts["history"]) == 1 and facts["recipe"]["train"]["devices"] == 4
    again = okdc("--resume", str(tmp_path / "run"), "--devices", "2", "--epochs", "2")
    assert "2 devices, before 4" in again.stderr and "16 images per step, before 32" in again.stderr
    assert len((tmp_path / "run" / "summary.csv").read_text().splitlines()) == 3
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2  # the first process's alone, of each time


def okdc(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "okdc", "compress", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_all(*sys.argv[1:])
