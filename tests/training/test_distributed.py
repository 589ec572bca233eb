"""Several processes are one: the same weights, the same images, one voice, and none that hangs."""

from __future__ import annotations

import inspect as python_inspect
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from okdc import methods
from okdc.anatomy import inspect
from okdc.cohort import Cohort
from okdc.data import Data, load, open_source, wrap
from okdc.data.samples import Part
from okdc.errors import DataError, OkdcError, RecipeError, RunError, TrainingError
from okdc.methods import Method
from okdc.needs import NOTHING, Needs
from okdc.pipeline import run_folder
from okdc.ranks import gather, local_rank, rank, world
from okdc.recipe import DataSettings, Recipe, TrainSettings
from okdc.system.signals import end_with_parent
from okdc.training import fit
from okdc.training.launch import _first_node, as_started, joined, launch, place, stay_until_closed
from okdc.training.parallel import synchronised
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


def start(*arguments: str, processes: int = 2, file: str = __file__, **environment: str) -> list[subprocess.Popen]:
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


TIMES = ("seconds", "images_per_second", "data_wait")


def train_all(folder: str, steps: str) -> None:
    with joined(SETTINGS):
        for case in CASES:
            torch.save(train(case, int(steps), Path(folder, case)), Path(folder, f"{case}.{rank()}.pt"))


# --- what goes wrong --------------------------------------------------------------------------------------------------

SHARDS = "reads shards"  # which is nothing that goes wrong, but what else two processes do while they are there
WRONG = ("stalls", "stalls aside", "dies", "is told to stop", "loses its launcher", "sees a NaN", "skips a layer")
ROBUST = replace(SETTINGS, timeout=4.0)


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


def be_tasks(folder: str) -> list[int]:
    """Four tasks on two nodes, as srun starts them, train a few steps; their exit codes."""
    tasks = []
    for i in range(4):
        if pid := os.fork():
            tasks.append(pid)
            continue
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        os.environ |= {
            "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": str(i),
            "SLURM_LOCALID": str(i % 2), "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": os.environ["JOB"],
        }  # fmt: skip
        with joined(SETTINGS):
            logging.getLogger("okdc.data").warning("rank %d warns", rank())
            settings = as_started(SETTINGS)
            found = train("dml", 1, Path(folder, "tasks"), devices=settings.devices, nodes=settings.nodes)
            torch.save(found, Path(folder, f"task.{rank()}.pt"))
        os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in tasks]


def be_troubled(folder: str) -> None:
    """One process per trouble, forked because the imports take long; how each ended goes to a file."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, as it should be
    codes: dict[str, Any] = {"tasks": be_tasks(folder)} if os.environ["RANK"] == "0" else {}
    for i, trouble in enumerate((*WRONG, SHARDS)):
        if pid := os.fork():
            codes[trouble] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            continue
        if trouble == "loses its launcher":
            if pid := os.fork():
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os.environ["TORCHELASTIC_RUN_ID"] = "any"
        os.environ["MASTER_PORT"] = os.environ["PORTS"].split()[i]
        with open(f"{folder}/{trouble}.{os.environ['RANK']}.txt", "w") as output:
            os.dup2(output.fileno(), 2)
        try:
            with joined(ROBUST):
                if trouble == SHARDS:
                    found = train_on_shards(Path(folder), Path(folder, trouble), 1, devices=2)
                else:
                    case = "kdcl, general" if trouble == "stalls aside" else "baseline"
                    found = train(case, 5, Path(folder, trouble), trouble, timeout=ROBUST.timeout)
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
    write_shards(folder)
    job = next(job for job in range(os.getpid() % 10000, 20000) if is_free(15000 + job % 10000))
    processes = start("trouble", str(folder), PORTS=" ".join(free_port() for _ in (*WRONG, SHARDS)), JOB=str(job))
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    (folder / "tasks.txt").write_text(outputs[0])
    return folder


def ended(troubled: Path, trouble: str) -> tuple[list[int], str]:
    """The exit codes of both processes, and what the first one said."""
    codes = [json.loads((troubled / f"codes.{i}.json").read_text())[trouble] for i in range(2)]
    return codes, (troubled / f"{trouble}.0.txt").read_text() + (troubled / f"{trouble}.1.txt").read_text()


def test_four_tasks_of_slurm_give_the_weights_of_one_process(troubled, tmp_path, one_thread):
    assert json.loads((troubled / "codes.0.json").read_text())["tasks"] == [0, 0, 0, 0]
    alone = train("dml", 1, tmp_path)["tensors"]
    for i in range(4):
        assert max_difference(alone, torch.load(troubled / f"task.{i}.pt")["tensors"]) < 1e-9
    said = (troubled / "tasks.txt").read_text()
    assert said.count(" warns") == 1 and "rank 0 warns" in said
    saved = torch.load(troubled / "tasks" / "last.pth.tar")["okdc"]
    assert (saved["devices"], saved["images"]) == (4, BATCH)


def test_a_rank_that_hangs_is_named_with_its_step(troubled):
    codes, said = ended(troubled, "stalls")
    assert codes == [1, 1]
    assert said.count("nothing has happened for 4 s") == 1
    assert "Furthest behind: rank 0 (waiting for data of training, step 3 of epoch 2). " in said
    assert "time.sleep" in said or "in batches" in said  # where it hangs


def test_a_rank_that_gets_no_images_set_aside_is_named(troubled):
    codes, said = ended(troubled, "stalls aside")
    assert codes == [1, 1]
    assert "Furthest behind: rank 1 (waiting for data of images set aside, batch 1 of epoch 2). " in said


def test_a_rank_that_dies_is_named_with_its_step(troubled):
    codes, said = ended(troubled, "dies")
    assert codes == [1, -signal.SIGKILL]
    assert "rank 0 lost the others (training, step 3 of epoch 1). Furthest behind: rank 1 (" in said
    assert "--resume auto" in said


def test_a_signal_to_one_rank_stops_all_and_one_process_goes_on(troubled, tmp_path, one_thread, capsys):
    codes, said = ended(troubled, "is told to stop")
    assert codes == [129, 129]
    assert said.count("0 epochs and 3 of 5 steps are done and saved") == 1
    last = troubled / "is told to stop" / "last.pth.tar"
    alone, resumed = (train("baseline", 5, tmp_path / str(i), resume=each) for i, each in enumerate((None, last)))
    assert max_difference(alone["tensors"], resumed["tensors"]) < 1e-9
    words = capsys.readouterr().err
    assert "1 devices, before 2" in words and "images per step" not in words


def test_ranks_whose_launcher_is_gone_save_and_end(troubled):
    codes, said = ended(troubled, "loses its launcher")
    assert codes == [143, -signal.SIGKILL]  # the first rank's own, and of the second's launcher
    assert said.count("0 epochs and 3 of 5 steps are done and saved") == 1


def test_other_systems_than_linux_have_no_word_of_a_launcher_that_is_gone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("what CDLL(None) is, Windows does not know"))
    end_with_parent()


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


def test_a_network_that_skips_layers_is_refused_in_words(troubled):
    codes, said = ended(troubled, "skips a layer")
    assert codes == [1, 1]
    assert said.count("did not use the same parameters in each step") == 2 and "Use --devices 1" in said


def write_shards(folder: Path) -> None:
    """Four files of 5 to 8 images as webdataset reads them, and a list of their classes."""
    (folder / "classes.txt").write_text("cat\ndog\n")
    for number in range(4):
        with tarfile.open(folder / f"train-{number}.tar", "w") as file:
            for i in range(5 + number):
                image = io.BytesIO()
                Image.new("RGB", (20, 20), (30 * i, 60 * number, 0)).save(image, "png")
                for name, content in ((f"{i}.png", image.getvalue()), (f"{i}.cls", str(i % 2).encode())):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    file.addfile(header, io.BytesIO(content))


def train_on_shards(shards: Path, folder: Path, workers: int, **changes: Any) -> dict[str, Any]:
    """The weights of two epochs of a network without batch norm, 4 images at once in each process."""
    settings = DataSettings(
        data=f"wds/{shards}", class_map=str(shards / "classes.txt"), workers=workers,
        train_split="train-{0..3}.tar|24", val_split="train-0.tar|5",
    )  # fmt: skip
    data = load(
        open_source(settings, 1), settings, CONFIG, batch_size=4, validation_batch_size=2, seed=1, device="cpu",
        rank=rank(), world=world(),
    )  # fmt: skip
    torch.manual_seed(0)
    target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    cohort = Cohort(target, torch.randn(2, 3, 8, 8))
    method, wanted = methods.get("baseline")(cohort), replace(SETTINGS, batch_size=4, **changes)
    state = fit(method, data, wanted, folder, arch="tiny", recipe={})
    return {"tensors": dict(target.state_dict()), "history": state.history, "confusion": state.confusion}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files open
def test_two_processes_that_divide_shards_give_the_weights_of_one(troubled, tmp_path, one_thread):
    pytest.importorskip("webdataset", reason="streams: pip install webdataset")
    assert ended(troubled, SHARDS)[0] == [0, 0]
    first, second = (torch.load(troubled / f"{SHARDS}.{i}.pt", weights_only=False) for i in range(2))
    alone = train_on_shards(troubled, tmp_path, 2, grad_accum_steps=2)
    assert max_difference(first["tensors"], second["tensors"]) == 0
    assert max_difference(alone["tensors"], first["tensors"]) < 1e-6
    assert alone["confusion"].equal(first["confusion"]) and alone["confusion"].sum() == 5


def max_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one if one[k].numel())


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process 7 on node", file=file, end="", flush=True)
print("locked", flush=True)
time.sleep(600)
"""


def test_a_folder_is_trained_by_one_run_at_a_time(tmp_path):
    (tmp_path / ".last.pth.tar.7.tmp").touch()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "locked\n"
    with ExitStack() as held:
        with pytest.raises(RunError, match="is in use by process 7 on node"):
            run_folder.begin(tmp_path, Recipe(), {}, held)
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".last.pth.tar.7.tmp"}
        holder.kill()
        holder.communicate()
        run_folder.begin(tmp_path, Recipe(), {}, held)
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "recipe.yaml", "student.json"}


def test_where_there_are_no_locks_what_a_killed_run_left_is_removed_too(tmp_path, monkeypatch):
    (tmp_path / ".last.pth.tar.7.tmp").touch()
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with ExitStack() as held:
        run_folder.begin(tmp_path, Recipe(), {}, held)
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "student.json"}


# --- data -------------------------------------------------------------------------------------------------------------

DIGITS = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
CONFIG = DIGITS | {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}


def digits(batch_size: int, number: int = 0, of: int = 1, needs: Needs = NOTHING, **settings: Any) -> Data:
    wanted = DataSettings(workers=0, **settings)
    return load(
        open_source(wanted, 1), wanted, CONFIG, batch_size=batch_size, validation_batch_size=50, seed=1, device="cpu",
        needs=needs, views=2 if needs.views else 1, rank=number, world=of,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("needs", "settings"),
    [
        (NOTHING, {}),
        (NOTHING, {"mixup": 0.4, "cutmix": 1.0, "reprob": 0.5, "aa": "rand-m9-mstd0.5"}),
        (Needs(pairs=True), {}),
        (Needs(indices=True), {"reprob": 0.5}),
        (Needs(views=True), {"mixup": 0.4, "reprob": 0.5}),
        (Needs(views=("weak", "strong")), {"mixup": 0.4, "reprob": 0.5, "aa": "rand-m9-mstd0.5"}),
        (Needs(indices=True), {"balanced_sampling": True}),
    ],
    ids=["plain", "blended", "pairs", "indices", "views", "weak and strong", "balanced"],
)
def test_four_processes_see_the_batch_of_one(needs, settings):
    batches = [next(digits(24, needs=needs, **settings).train.batches(1, 3))]
    batches += [next(digits(6, i, 4, needs, **settings).train.batches(1, 3)) for i in range(4)]
    places = [place for i in range(4) for place in Part(6, i, 4, mirrored="mixup" in settings).places()]
    assert sorted(places) == list(range(24))
    for whole, *parts in zip(*batches, strict=True):
        axis = 1 if needs.views and whole.dim() > 2 else 0
        together = torch.cat(parts, axis).index_select(axis, torch.tensor(places).argsort())
        torch.testing.assert_close(together, whole)


def test_every_validation_image_is_counted_once():
    data = digits(8)
    whole = [labels.tolist() for _, labels in data.validation]
    parts = [[labels.tolist() for _, labels in digits(8).validation.every(i, 3)] for i in range(3)]
    assert len(whole) == len(data.validation) == 8
    assert [each for i in range(8) for each in [parts[i % 3][i // 3]]] == whole
    assert [labels.tolist() for _, labels in data.validation] == whole  # again, whole


def test_batches_of_ones_own_are_divided_and_those_of_a_distributed_sampler_are_not():
    batches = [
        (torch.full((2 if i < 6 else 1, 3, 8, 8), float(i)), torch.zeros(2 if i < 6 else 1).long()) for i in range(7)
    ]
    seen = [
        [int(images[0, 0, 0, 0]) for images, _ in wrap(batches, num_classes=2, rank=i, world=2).train.batches(0)]
        for i in range(2)
    ]
    assert seen == [[0, 2, 4], [1, 3, 5]]
    for loader in parts_of_eight():
        mine = [wrap(loader, num_classes=8, rank=1, world=2).train.batches(epoch) for epoch in range(2)]
        seen = [torch.cat([labels for _, labels in batches]).tolist() for batches in mine]
        assert [len(set(each)) for each in seen] == [4, 4] and seen[0] != seen[1]  # half of them, others each time


def parts_of_eight() -> list[DataLoader]:
    """The second half of eight images, as a DataLoader divides it and as one with a batch sampler does."""
    dataset = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8))
    sampler = DistributedSampler(dataset, 2, 1)
    return [
        DataLoader(dataset, 2, sampler=sampler), DataLoader(dataset, batch_sampler=BatchSampler(sampler, 2, False))
    ]  # fmt: skip


def test_a_validation_loader_that_is_divided_already_is_refused():
    whole = [(torch.randn(8, 3, 8, 8), torch.arange(8))]
    for loader in parts_of_eight():
        with pytest.raises(DataError, match="leave out its sampler, and okdc divides its batches"):
            wrap(whole, loader, num_classes=8, rank=1, world=2)


# --- the launcher -----------------------------------------------------------------------------------------------------


def test_the_environment_says_who_one_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", *(n for n in os.environ if n.startswith("SLURM"))):
        monkeypatch.delenv(name, raising=False)
    assert place(SETTINGS) is None
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert place(SETTINGS) is None  # a batch script is one process
    for name, value in {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5"}.items():
        monkeypatch.setenv(name, value)
    assert place(SETTINGS) == (5, 8, 2)
    assert (as_started(SETTINGS).devices, as_started(SETTINGS).nodes) == (4, 2)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "5")
    with pytest.raises(RecipeError, match="--ntasks-per-node 2, which is 4 in all"):
        as_started(SETTINGS)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert place(SETTINGS) == (5, 2, 2)
    assert place(replace(SETTINGS, devices=4, nodes=2)) is None  # one task on each node, which starts the others
    for name, value in {"RANK": "1", "WORLD_SIZE": "6", "GROUP_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert place(SETTINGS) == (1, 6, 3)
    for listed, expected in {"gpu[07-09,12],big3": "gpu07", "a1,a2": "a1", "login": "login"}.items():
        monkeypatch.setenv("SLURM_STEP_NODELIST", listed)
        assert _first_node() == expected


def test_each_process_of_a_node_has_a_device_of_its_own(monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("okdc.ranks.world", lambda: 12)
    monkeypatch.setattr("okdc.ranks.rank", lambda: 9)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert local_rank() == 1  # torch's mp.spawn sets no variable
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert local_rank() == 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert local_rank() == 0  # --gpus-per-task shows each its own
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert local_rank() == 2  # torchrun shows all to each: one too many is refused


@pytest.mark.parametrize("ended", ["in order", "killed"])
def test_a_process_of_each_other_node_waits_for_the_first_to_end(ended, monkeypatch):
    """torch's launcher on a node ends 300 s after its processes, and may take those of other nodes with it."""
    for name, value in {"TORCHELASTIC_RUN_ID": "any", "GROUP_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    made: list[Any] = []
    ours = {"world": lambda: 2, "local_rank": lambda: 0, "first": lambda work: made.append(work()) or made[0]}
    for name, value in ours.items():
        monkeypatch.setattr(f"okdc.training.launch.{name}", value)
    monkeypatch.setattr("socket.getfqdn", lambda: "localhost")
    first, other = ExitStack(), ExitStack()
    stay_until_closed(first)
    monkeypatch.setattr("okdc.training.launch.first", lambda work: made[0])
    stay_until_closed(other)
    waiting = threading.Thread(target=other.close)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    if ended == "killed":
        first.pop_all()  # its server is gone, and nothing was said
    first.close()
    waiting.join(60)
    assert not waiting.is_alive()


def test_nobody_waits_on_one_node_or_without_torchs_launcher(monkeypatch):
    monkeypatch.setattr("okdc.training.launch.world", lambda: 2)
    monkeypatch.setattr("okdc.training.launch.first", lambda work: pytest.fail("the others are asked"))
    for run, nodes in ((None, "2"), ("any", "1")):
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
        if run:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        stay_until_closed(ExitStack())


def test_batch_norm_is_synchronised_and_given_back_but_for_the_users_own(monkeypatch):
    monkeypatch.setattr("okdc.training.parallel.world", lambda: 2)
    norms = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4), nn.SyncBatchNorm(4), SyncBatchNormAct(4))
    kinds = [type(norm) for norm in norms]
    with synchronised(norms, True):
        assert [type(norm) for norm in norms] == [nn.SyncBatchNorm, SyncBatchNormAct] * 2
    assert [type(norm) for norm in norms] == kinds
    assert [hasattr(norm, "process_group") for norm in norms] == [False, False, True, True]


def test_learning_rate_and_images_per_step_are_those_of_all_devices():
    settings = replace(SETTINGS, lr=None, lr_base=0.1, batch_size=64, devices=4, nodes=2, grad_accum_steps=2)
    assert (settings.images_per_step, settings.peak_lr) == (1024, pytest.approx(0.4))


def test_devices_in_python_say_how_to_start(monkeypatch):
    with pytest.raises(RecipeError, match="torchrun --nproc-per-node 2 SCRIPT"):
        as_started(replace(SETTINGS, devices=2))


def test_the_launcher_passes_on_how_processes_end(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }

    def end(second: str) -> int:
        program = f"import os, time; time.sleep(1) if os.environ['RANK'] == '0' else {second}"
        return launch([sys.executable, "-c", program], replace(SETTINGS, devices=2), None)

    try:
        assert end("os._exit(os.environ['TORCH_ELASTIC_SHUTDOWN_TIMEOUT'] != '120')") == 0  # time to save
        assert end("os._exit(3)") == 3
        with pytest.raises(TrainingError, match="rank 1 was killed by SIGKILL"):
            end("os.kill(os.getpid(), 9)")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    {"train": train_all, "trouble": be_troubled}[sys.argv[1]](*sys.argv[2:])
