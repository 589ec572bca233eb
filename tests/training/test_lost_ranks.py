"""What goes wrong in one of several processes is said by name, and none hangs."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from okdc import methods
from okdc.cohort import Cohort
from okdc.data import load, open_source
from okdc.errors import OkdcError
from okdc.ranks import rank, world
from okdc.recipe import DataSettings
from okdc.training import fit
from okdc.training.launch import as_started, joined
from tests.helpers.processes import (
    BATCH,
    CONFIG,
    SETTINGS,
    finish,
    free_port,
    is_free,
    max_difference,
    start,
    train,
)

SHARDS = "reads shards"  # which is nothing that goes wrong, but what else two processes do while they are there
WRONG = ("stalls", "stalls aside", "dies", "is told to stop", "loses its launcher", "sees a NaN", "skips a layer")
ROBUST = replace(SETTINGS, timeout=4.0)


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
    processes = start(str(folder), file=__file__, PORTS=" ".join(free_port() for _ in (*WRONG, SHARDS)), JOB=str(job))
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    be_troubled(*sys.argv[1:])
