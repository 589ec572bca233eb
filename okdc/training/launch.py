"""Several processes: how they are started, what place each has, and how they end together."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from okdc.errors import RecipeError, TrainingError
from okdc.ranks import first, local_rank, rank, world
from okdc.recipe import TrainSettings
from okdc.system.signals import end_with_parent, heeded
from okdc.training.watch import FOR_EVER

ENDED = -signal.SIGTERM  # how a launcher ends the ranks that are left
_groups = itertools.count()  # that this process has joined


def place(settings: TrainSettings) -> tuple[int, int, int] | None:
    """(rank, world, nodes) where torchrun, SLURM's srun or okdc itself has started this process as one of several."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("GROUP_WORLD_SIZE", 1))
    # Not SLURM_NTASKS, which a batch script has too, though it is one process.
    tasks, nodes = int(env.get("SLURM_STEP_NUM_TASKS", 1)), int(env.get("SLURM_STEP_NUM_NODES", 1))
    if tasks > 1 and (tasks != nodes or settings.devices == 1):  # one task on each node is there to start the others
        return int(env["SLURM_PROCID"]), tasks, nodes
    return None


def as_started(settings: TrainSettings) -> TrainSettings:
    """The settings with the devices and nodes that there are; RecipeError where others were asked for in Python."""
    here = place(settings)
    if here is not None or world() > 1:
        _, processes, nodes = here or (0, world(), 1)
        if processes % nodes:
            raise RecipeError(
                f"{processes} processes were started on {nodes} nodes; expected as many on each: "
                f"srun --ntasks-per-node {processes // nodes}, which is {processes // nodes * nodes} in all."
            )
        return replace(settings, devices=processes // nodes, nodes=nodes)
    if settings.devices * settings.nodes > 1:
        raise RecipeError(
            f"devices={settings.devices} and nodes={settings.nodes} take {settings.devices * settings.nodes} "
            f"processes, and this is one. Start them: torchrun --nproc-per-node {settings.devices} SCRIPT.py, or "
            f"okdc compress --devices {settings.devices}."
        )
    return settings


@contextmanager
def joined(settings: TrainSettings) -> Iterator[None]:
    """All processes that were started together as one group; nothing where there is one, or where they are already."""
    here = place(settings)
    if here is None or here[1] == 1 or dist.is_initialized():
        with _first_alone_warns():
            yield
        return
    on_cuda = settings.device.startswith("cuda") or (settings.device == "auto" and torch.cuda.is_available())
    if settings.sync_bn and not on_cuda:
        raise RecipeError("--sync-bn on the CPU: torch synchronises batch norm on CUDA only. Leave it out.")
    os.environ.setdefault("MASTER_ADDR", _first_node())
    os.environ.setdefault("MASTER_PORT", str(15000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 10000))
    # The watch is to speak first: it knows who is late.
    options: dict[str, Any] = {"timeout": timedelta(seconds=(settings.timeout or FOR_EVER) + 60)}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # torch's launcher, which may be gone without a word
    store, number, count = next(dist.rendezvous("env://", *here[:2], **options))
    store = dist.PrefixStore(f"group{next(_groups)}", store)  # what an earlier run of these processes left is not read
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, **options)
    try:
        if on_cuda and local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        with _first_alone_warns():
            yield
    finally:
        dist.destroy_process_group()


def stay_until_closed(held: ExitStack) -> None:
    """Let one process of each other node wait until the first one closes `held`, or is gone.

    For torch's launcher, which ends on a node 300 s after its processes. Where that is the node at which all meet, it
    would take the launchers of the others with it, and the first process, which may be writing files still.
    """
    if world() == 1 or "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("GROUP_WORLD_SIZE") == "1":
        return
    served: list[dist.TCPStore] = []

    def serve() -> tuple[str, int]:
        served.append(dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
        return socket.getfqdn(), served[0].port

    host, port = first(serve)
    if served:
        held.callback(served[0].set, "closed", "")
    elif local_rank() == 0:
        held.callback(_wait, host, port)


def _wait(host: str, port: int) -> None:
    with suppress(dist.DistError):  # the first process has ended, or cannot be reached
        store = dist.TCPStore(host, port, timeout=timedelta(seconds=60))
        while not store.check(["closed"]):
            time.sleep(1)  # not store.wait(), in which no signal is heard


@contextmanager
def _first_alone_warns() -> Iterator[None]:
    log = logging.getLogger("okdc")
    before = log.level
    if rank() > 0:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _first_node() -> str:
    """The first host of SLURM's list, such as gpu[07-09,12],big3."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "localhost")
    found = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else "localhost"


def launch(command: Sequence[str], settings: TrainSettings, rendezvous: str | None) -> int:
    """Run `command` once per device, by torch's elastic launcher, until all have ended; the exit code of the first.

    `rendezvous` is HOST:PORT of the first node, where there are several. TrainingError where one was killed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if settings.nodes > 1 and rendezvous is None:
        raise RecipeError(
            f"--nodes {settings.nodes} needs --rendezvous HOST:PORT, the same on every node: the first one's address "
            "and a free port, such as node01:29400."
        )
    share = max(1, (os.cpu_count() or 1) // settings.devices)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))  # else all processes take all cores, and wait
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # seconds to finish a step and save, not 30
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=settings.nodes, max_nodes=settings.nodes, nproc_per_node=settings.devices, max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint=rendezvous or "localhost:0", run_id="okdc",
            local_addr=None if rendezvous else "localhost", logs_specs=DefaultLogsSpecs(logs),
            signals_to_handle=",".join(number.name for number in heeded()),
        )  # fmt: skip
        logging.disable(logging.ERROR)  # the launcher's own account of what the processes have said themselves
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            return _exit_code(error.failures)
        except SignalException as stopped:  # passed on to all, which have finished their step and saved
            return 128 + stopped.sigval
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _exit_code(failures: dict[int, Any]) -> int:
    """What the first process to fail ended with, whose message the user has seen; TrainingError where it was killed."""
    killed = {number: each for number, each in failures.items() if each.exitcode < 0 and each.exitcode != ENDED}
    for number, each in killed.items():
        raise TrainingError(
            f"rank {number} was killed by {each.signal_name()}, so the others were stopped. The last saved state is "
            "kept: continue with --resume auto."
        )
    by_time = sorted((each for each in failures.values() if each.exitcode > 0), key=lambda each: each.timestamp)
    return by_time[0].exitcode if by_time else 1
