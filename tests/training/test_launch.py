"""Who starts the processes of a run, how each knows its place, and how their ends are passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from okdc.errors import RecipeError, TrainingError
from okdc.ranks import local_rank
from okdc.system.signals import end_with_parent
from okdc.training.launch import _first_node, as_started, launch, place, stay_until_closed
from tests.helpers.processes import SETTINGS


def test_other_systems_than_linux_have_no_word_of_a_launcher_that_is_gone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("what CDLL(None) is, Windows does not know"))
    end_with_parent()


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


TWICE = """
import os, time, torch
from okdc.ranks import gather, rank
from okdc.training.launch import joined
from tests.helpers.processes import SETTINGS

for _ in range(2):
    with joined(SETTINGS):
        print(gather(torch.tensor([rank()])).tolist())
    if os.environ["RANK"] == "0":
        time.sleep(1.5)  # as if it exported
"""


def test_processes_that_torchrun_started_join_again_for_another_run() -> None:
    """The other one is first to join again, and would read where the first one listened in the run before."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWICE], env=os.environ | place | {"RANK": str(each), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE, text=True,
        )
        for each in range(2)
    ]  # fmt: skip
    assert [each.communicate(timeout=120)[0].split("\n") for each in ranks] == [["[0, 1]", "[0, 1]", ""]] * 2
