"""Several processes are one: the same weights, the same images, one voice, and none that hangs."""

from __future__ import annotations

import inspect as python_inspect
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc import methods
from okdc._distributed import joined
from okdc._ranks import _Sum, rank, world
from okdc.anatomy import inspect
from okdc.cohort import Cohort
from okdc.methods import Method
from okdc.settings import TrainSettings
from okdc.train import fit
from tests.networks import Tiny

BATCH, STEPS, EPOCHS, SIZE = 8, 10, 2, 16  # of all processes together
SETTINGS = TrainSettings(epochs=EPOCHS, batch_size=BATCH, lr=0.05, device="cpu", log_interval=100)
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in methods.names()} | {
    "mcl_okd": ("mcl_okd", {"negatives": 8}),
    "mcl, memory": ("mcl", {"memory": True, "negatives": 16}),
    "lmcl": ("lmcl", {"meta_every": 5}),
    "lmcl, memory": ("lmcl", {"meta_every": 5, "memory": True, "negatives": 16}),
    "kdcl, general": ("kdcl", {"soft_target": "general"}),
    "kdcl, linear": ("kdcl", {"soft_target": "linear"}),
    "sokd, sp": ("sokd", {"distance": "sp"}),
}


class Synchronised(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on the CPU, where torch has none; twice differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        n = world() * x.numel() / x.shape[1]
        mean = _Sum.apply(x.sum(axes)) / n
        shape = (1, -1, *[1] * (x.dim() - 2))
        var = _Sum.apply((x - mean.view(shape)).square().sum(axes)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        return F.batch_norm(x, None, None, self.weight, self.bias, True) if n == 0 else (
            (x - mean.view(shape)) * (var + self.eps).rsqrt().view(shape) * self.weight.view(shape)
            + self.bias.view(shape)
        )

    def _check_input_dim(self, x: Tensor) -> None:
        pass


def build(case: str) -> Method:
    name, settings = CASES[case]
    kind = methods.get(name)
    torch.manual_seed(0)
    target, images = Tiny(), torch.randn(2, 3, SIZE, SIZE)
    plan = kind.plan(inspect(target, images), members=min(kind.members, 3), extra_blocks=min(kind.extra_blocks, 1))
    cohort = Cohort(target, images, plan, taps=kind.taps, trunk_gradient=kind.trunk_gradient)
    given: dict[str, Any] = {"teacher": Tiny()} if kind.needs_teacher else {}
    if "train_labels" in python_inspect.signature(kind.__init__).parameters:
        given["train_labels"] = tensors()[1]
    method = kind(cohort, **given, **settings)
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = Synchronised
    return method


def tensors() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (BATCH * STEPS,), generator=draw)
    return torch.randn(len(labels), 3, SIZE, SIZE, generator=draw) + labels.view(-1, 1, 1, 1), labels


class Batches:
    """This process's part of each batch, with views and indices where the method asks for them."""

    def __init__(self, method: Method, needs: Any) -> None:
        self.images, self.labels = tensors()
        self.needs, self.views = needs, len(method.cohort)

    def __len__(self) -> int:
        return STEPS

    def batches(self, epoch: int, start: int = 0):
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(epoch)).split(BATCH)
        for chosen in order[start:]:
            mine = chosen.chunk(world())[rank()]
            images, labels = self.images[mine], self.labels[mine]
            if self.needs.views:
                images = torch.stack([images + 0.1 * i for i in range(self.views)])
            yield (images, labels, mine) if self.needs.indices else (images, labels)


def train(case: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """The weights, banks, averages and figures of 20 steps."""
    method, (name, settings) = build(case), CASES[case]
    needs = methods.get(name).needs(**settings)
    images, labels = tensors()
    part = list(zip(images[:27].split(6), labels[:27].split(6)))  # 5 batches, unevenly divided
    data: Any = SimpleNamespace(
        train=Batches(method, needs), validation=part, held_out=part if needs.held_out else None
    )  # fmt: skip
    wanted = replace(
        SETTINGS, batch_size=BATCH // world(), devices=world(), model_ema=method.student is method.cohort.target
    )  # fmt: skip
    state = fit(method, data, replace(wanted, **changes), folder, arch="tiny", recipe={})
    found = {f"method.{k}": v for k, v in method.state_dict().items() if isinstance(v, Tensor)}
    found |= {f"student.{k}": v for k, v in state.student.state_dict().items()}
    return {"tensors": found, "history": state.history}


def start(*arguments: str, processes: int = 2, **environment: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost", "MASTER_PORT": port,
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, *arguments], env=common | {"RANK": str(i), **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> list[str]:
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """What two processes made of every case, each written by itself."""
    folder = tmp_path_factory.mktemp("pair")
    processes = start("all", str(folder))
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return folder


def test_two_processes_give_the_weights_of_one(pair, tmp_path):
    torch.set_num_threads(1)
    rows, far = [], []
    for case in CASES:
        alone = train(case, tmp_path / case)
        first, second = (torch.load(pair / f"{case}.{i}.pt") for i in range(2))
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
            assert {k: v for k, v in theirs.items() if k not in TIMES} == pytest.approx(
                {k: v for k, v in mine.items() if k not in TIMES}, rel=1e-3, abs=1e-3, nan_ok=True
            ), case
    print("\nlargest difference after 20 steps, two processes and one:\n" + "\n".join(rows))
    assert not far


TIMES = ("seconds", "images_per_second")


def work(folder: str) -> None:
    with joined(SETTINGS):
        for case in CASES:
            found = train(case, Path(folder, case))
            torch.save(found, Path(folder, f"{case}.{rank()}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"all": work}[sys.argv[1]](*sys.argv[2:])
