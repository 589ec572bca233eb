"""Several processes are one: the same weights, the same images, one voice, and none that hangs."""

from __future__ import annotations

import inspect as python_inspect
import json
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

import pytest
import torch
from torch import Tensor, nn

from okdc import methods
from okdc._distributed import joined
from okdc._ranks import _Sum, rank, world
from okdc.anatomy import inspect
from okdc.cohort import Cohort
from okdc.errors import OkdcError
from okdc.methods import Method
from okdc.settings import TrainSettings
from okdc.train import fit
from tests.networks import Tiny

PRECISION = torch.float64  # in which nothing but a mistake makes a difference: rounding grows with every step
BATCH, EPOCHS, SIZE = 8, 2, 16  # images per step of all processes together
SETTINGS = TrainSettings(epochs=EPOCHS, batch_size=BATCH, lr=0.05, device="cpu", log_interval=100)
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in methods.names()} | {
    "mcl_okd": ("mcl_okd", {"negatives": 8}),
    "mcl, memory": ("mcl", {"memory": True, "negatives": 16}),
    "lmcl": ("lmcl", {"meta_every": 2}),
    "lmcl, memory": ("lmcl", {"meta_every": 2, "memory": True, "negatives": 16}),
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
        normal = (x - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        return normal * self.weight.view(shape) + self.bias.view(shape)

    def _check_input_dim(self, x: Tensor) -> None:
        """Maps (B, D, H, W) and vectors (B, D) alike."""


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    data: Any = SimpleNamespace(train=batches, validation=part, held_out=part if needs.held_out else None)
    wanted = replace(
        SETTINGS, batch_size=BATCH // world(), devices=world(), model_ema=method.student is method.cohort.target
    )  # fmt: skip
    state = fit(method, data, replace(wanted, **changes), folder, resume=resume, arch="tiny", recipe={})
    found = {f"method.{k}": v for k, v in method.state_dict().items() if isinstance(v, Tensor)}
    found |= {f"student.{k}": v for k, v in state.student.state_dict().items()}
    return {"tensors": found, "history": state.history}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def start(*arguments: str, processes: int = 2, **environment: str) -> list[subprocess.Popen]:
    common = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "localhost", "MASTER_PORT": free_port(),
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


@pytest.mark.parametrize("steps", [2, pytest.param(10, marks=pytest.mark.ddp)])
def test_two_processes_give_the_weights_of_one(tmp_path, one_thread, steps):
    processes = start("train", str(tmp_path), str(steps))
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


TIMES = ("seconds", "images_per_second")


def train_all(folder: str, steps: str) -> None:
    with joined(SETTINGS):
        for case in CASES:
            torch.save(train(case, int(steps), Path(folder, case)), Path(folder, f"{case}.{rank()}.pt"))


# --- what goes wrong --------------------------------------------------------------------------------------------------

WRONG = ("stalls", "dies", "is told to stop", "sees a NaN")
ROBUST = replace(SETTINGS, timeout=4.0)


class Troubled(Batches):
    """Batches of two processes, in the third of which something happens to the second process."""

    def __init__(self, trouble: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.trouble = trouble

    def batches(self, epoch: int, start: int = 0):
        for step, (images, labels) in enumerate(super().batches(epoch, start), start):
            if (rank(), epoch, step) == (1, 0, 2):
                if self.trouble == "stalls":
                    time.sleep(600)
                elif self.trouble == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif self.trouble == "is told to stop":
                    os.kill(os.getpid(), signal.SIGTERM)
                elif self.trouble == "sees a NaN":
                    images = images * torch.nan
            yield images, labels


def be_troubled(folder: str) -> None:
    """One process per trouble, forked because the imports take long; how each ended goes to a file."""
    codes = {}
    for i, trouble in enumerate(WRONG):
        if pid := os.fork():
            codes[trouble] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            continue
        os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[i]
        with open(f"{folder}/{trouble}.{os.environ['RANK']}.txt", "w") as output:
            os.dup2(output.fileno(), 2)
        try:
            with joined(ROBUST):
                found = train("baseline", 5, Path(folder, trouble), trouble, timeout=ROBUST.timeout)
                torch.save(found, Path(folder, f"{trouble}.{rank()}.pt"))
        except OkdcError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(error.exit_code)
        except SystemExit as stopped:
            os._exit(stopped.code)
        os._exit(0)
    Path(folder, f"codes.{os.environ['RANK']}.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def troubled(tmp_path_factory) -> Path:
    """What two processes left behind, of which the second got into each kind of trouble."""
    folder = tmp_path_factory.mktemp("troubled")
    processes = start("trouble", str(folder), PORTS=" ".join(free_port() for _ in WRONG))
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return folder


def ended(troubled: Path, trouble: str) -> tuple[list[int], str]:
    """The exit codes of both processes, and what the first one said."""
    codes = [json.loads((troubled / f"codes.{i}.json").read_text())[trouble] for i in range(2)]
    return codes, (troubled / f"{trouble}.0.txt").read_text() + (troubled / f"{trouble}.1.txt").read_text()


def test_a_rank_that_hangs_is_named_with_its_step(troubled):
    codes, said = ended(troubled, "stalls")
    assert codes == [1, 1]
    assert said.count("nothing has happened for 4 s") == 1
    assert "rank 1 (waiting for data of training, step 3 of epoch 1)" in said
    assert "time.sleep" in said or "in batches" in said  # where it hangs


def test_a_rank_that_dies_is_named_with_its_step(troubled):
    codes, said = ended(troubled, "dies")
    assert codes == [1, -signal.SIGKILL]
    assert "rank 0 lost the others (training, step 3 of epoch 1). Furthest behind: rank 1 (" in said
    assert "--resume auto" in said


def test_a_signal_to_one_rank_stops_all_and_one_process_goes_on(troubled, tmp_path, one_thread, capsys):
    codes, said = ended(troubled, "is told to stop")
    assert codes == [143, 143]
    assert said.count("0 epochs and 3 of 5 steps are done and saved") == 1
    last = troubled / "is told to stop" / "last.pth.tar"
    alone, resumed = (train("baseline", 5, tmp_path / str(i), resume=each) for i, each in enumerate((None, last)))
    assert max_difference(alone["tensors"], resumed["tensors"]) < 1e-9
    words = capsys.readouterr().err
    assert "1 devices, before 2" in words and "images per step" not in words


def test_another_number_of_devices_says_all_that_changes(troubled, tmp_path, one_thread, capsys):
    train("baseline", 10, tmp_path, resume=troubled / "is told to stop" / "last.pth.tar", batch_size=4, lr=None)
    words = capsys.readouterr().err
    for change in (
        "1 devices, before 2", "4 images per step, before 8", "as the learning rate of the schedule, before 0.05",
        "6 of 10 steps of this epoch done, before 3 of 5",
    ):  # fmt: skip
        assert change in words


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(troubled):
    codes, _ = ended(troubled, "sees a NaN")
    first, second = (torch.load(troubled / f"sees a NaN.{i}.pt") for i in range(2))
    assert codes == [0, 0]
    assert [row["skipped_steps"] for row in first["history"]] == [1, 0] and torch.isfinite(
        torch.stack([value.double().sum() for value in first["tensors"].values()])
    ).all()
    assert max_difference(first["tensors"], second["tensors"]) == 0


def max_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one if one[k].numel())


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"train": train_all, "trouble": be_troubled}[sys.argv[1]](*sys.argv[2:])
