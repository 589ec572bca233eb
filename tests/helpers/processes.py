"""A run in several processes on the CPU: how they are started, what they train, and what goes wrong in them."""

from __future__ import annotations

import inspect as python_inspect
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from okdc import methods
from okdc.anatomy import inspect
from okdc.cohort import Cohort
from okdc.methods import Method
from okdc.ranks import gather, rank, world
from okdc.recipe import TrainSettings
from okdc.training import fit
from tests.helpers.networks import Tiny

PRECISION = torch.float64  # in which nothing but a mistake makes a difference: rounding grows with every step
BATCH, EPOCHS, SIZE = 8, 2, 16  # images per step of all processes together
SETTINGS = TrainSettings(epochs=EPOCHS, batch_size=BATCH, lr=0.05, device="cpu", log_interval=100)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {}) for name in methods.names() if "classify" in methods.get(name).tasks
} | {
    "mcl_okd": ("mcl_okd", {"negatives": 8}),
    "mcl, memory": ("mcl", {"memory": True, "negatives": 16}),
    "lmcl": ("lmcl", {"meta_every": 2}),
    "lmcl, memory": ("lmcl", {"meta_every": 2, "memory": True, "negatives": 16}),
    "kdcl, general": ("kdcl", {"soft_target": "general"}),
    "kdcl, linear": ("kdcl", {"soft_target": "linear"}),
    "switokd, cold": ("switokd", {"temperature": 0.02}),  # in which teachers pause soon
    "mcl, mixed": ("mcl", {}),
    "mcl, memory, mixed": ("mcl", {"memory": True, "negatives": 16}),
    "lmcl, mixed": ("lmcl", {"meta_every": 2}),
    "mcl_okd, mixed": ("mcl_okd", {"negatives": 8}),
    "sokd, sp": ("sokd", {"distance": "sp"}),
}
DIGITS = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
CONFIG = DIGITS | {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}


class Synchronised(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on the CPU, where torch has none; twice differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        n = world() * x.numel() / x.shape[1]
        mean = gather(x.sum(axes)[None]).sum(0) / n
        shape = (1, -1, *[1] * (x.dim() - 2))
        var = gather((x - mean.view(shape)).square().sum(axes)[None]).sum(0) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        normal = (x - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        return normal * self.weight.view(shape) + self.bias.view(shape)

    def _check_input_dim(self, x: Tensor) -> None:
        """Maps (B, D, H, W) and vectors (B, D) alike."""


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
    method = kind(cohort, **given, **settings).to(PRECISION)
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = Synchronised
    return method


def tensors() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (10 * BATCH,), generator=draw)
    images = torch.randn(len(labels), 3, SIZE, SIZE, generator=draw) + labels.view(-1, 1, 1, 1)
    return images.to(PRECISION), labels


class Batches:
    """This process's part of each batch, with views and indices where the method asks for them."""

    mixed = False
    """Each image with the one as far from the other end."""

    def __init__(self, steps: int, method: Method, needs: Any) -> None:
        self.images, self.labels = tensors()
        self.steps, self.needs, self.views = steps, needs, len(method.cohort)

    def __len__(self) -> int:
        return self.steps

    def batches(self, epoch: int, start: int = 0):
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(epoch)).split(BATCH)
        for chosen in order[start : self.steps]:
            mine = chosen.chunk(world())[rank()]
            images, labels = self.images[mine], self.labels[mine]
            if self.mixed:
                others, classes = (
                    chosen.flip(0).chunk(world())[rank()],
                    nn.functional.one_hot(self.labels).to(PRECISION),
                )
                mixture = (0.7 * x[mine] + 0.3 * x[others] for x in (self.images, classes))
                yield (*mixture, torch.stack([mine, others], 1), torch.full((len(mine),), 0.7, dtype=PRECISION))
                continue
            if self.needs.views:
                images = torch.stack([images + 0.1 * i for i in range(self.views)])
            yield (images, labels, mine) if self.needs.indices else (images, labels)


def train(
    case: str, steps: int, folder: Path, trouble: str = "", resume: Path | None = None, **changes: Any
) -> dict[str, Any]:
    """The weights, banks, averages and figures of two epochs of so many steps."""
    method, (name, settings) = build(case), CASES[case]
    needs = methods.get(name).needs(**settings)
    images, labels = tensors()
    part = list(zip(images[:27].split(6), labels[:27].split(6)))  # 5 batches, unevenly divided
    batches = Troubled(trouble, steps, method, needs) if trouble else Batches(steps, method, needs)
    batches.mixed = case.endswith(", mixed")
    aside = Aside(part) if trouble == "stalls aside" else part
    data: Any = SimpleNamespace(train=batches, validation=part, held_out=aside if needs.held_out else None)
    wanted = replace(
        SETTINGS, batch_size=BATCH // world(), devices=world(), model_ema=method.student is method.cohort.target
    )  # fmt: skip
    state = fit(method, data, replace(wanted, **changes), folder, resume=resume, arch="tiny", recipe={})
    found = {f"method.{k}": v for k, v in method.state_dict().items() if isinstance(v, Tensor)}
    found |= {f"student.{k}": v for k, v in state.student.state_dict().items()}
    found["confusion"] = state.confusion  # added up over the ranks
    return {"tensors": found, "history": state.history}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("localhost", port)) != 0


def start(*arguments: str, file: str, processes: int = 2, **environment: str) -> list[subprocess.Popen]:
    common = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost", "MASTER_PORT": free_port(),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", file, *arguments], env=common | {"RANK": str(i), **environment},
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


class Troubled(Batches):
    """Batches of two processes, in the third of which something happens to the second process.

    It is the first one that stalls, and in the second epoch: it has had one batch more of the validation by then.
    """

    def __init__(self, trouble: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.trouble, self.target = trouble, arguments[1].cohort.target

    def batches(self, epoch: int, start: int = 0):
        for step, (images, labels) in enumerate(super().batches(epoch, start), start):
            if self.trouble == "skips a layer" and step == 2:  # both of them
                self.target.stem.register_forward_hook(lambda module, given, out: out.detach())
            if (rank(), epoch, step) == ((0, 1, 2) if self.trouble == "stalls" else (1, 0, 2)):
                if self.trouble == "stalls":
                    time.sleep(600)
                elif self.trouble == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif self.trouble == "is told to stop":
                    os.kill(os.getpid(), signal.SIGHUP)
                elif self.trouble == "loses its launcher":
                    os.kill(os.getppid(), signal.SIGKILL)
                    time.sleep(1)  # until word of it has come
                elif self.trouble == "sees a NaN":
                    images = images * torch.nan
            yield images, labels


class Aside(list):
    """Images set aside, which do not come to the second process; kdcl looks at them from the second epoch on."""

    def __iter__(self):
        if rank() == 1:
            time.sleep(600)
        yield from super().__iter__()


def max_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one if one[k].numel())
