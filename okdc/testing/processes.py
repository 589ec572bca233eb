"""Two processes against one: with half of each batch, each has to end with the weights of one that has it all.

`python -m okdc.testing.processes FOLDER` is one of the two.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from okdc import methods
from okdc.methods import Method
from okdc.ranks import rank, world
from okdc.system.randomness import own_randomness, seed_everything
from okdc.testing.case import Case
from okdc.training.parallel import wrapped

STEPS, BATCH = 3, 8
TOLERANCE = 0.01  # of how far a tensor moved
TIMEOUT = 300  # seconds


def unreachable(case: Case) -> str | None:
    """Why another process cannot make this case, in words; None where it can."""
    name = methods.name_of(case.method)
    if "<locals>" in name or name.startswith("__main__:"):
        return "another process cannot import the class: put it into a file, at its top level"
    if callable(case.network) or case.teacher:
        return "another process cannot make the network: give the name of one, or package.module:function"
    return None


def two_processes(*cases: Case) -> None:
    """Train a few steps alone and in two processes; AssertionError where weights and buffers end apart.

    Batch norm is at rest, which would else see another batch. RuntimeError where a process fails otherwise.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        told = [
            {"method": methods.name_of(c.method), "network": c.network, "size": c.size, "settings": c.settings,
             "wishes": c.wishes} for c in cases
        ]  # fmt: skip
        (folder / "cases.json").write_text(json.dumps(told), encoding="utf-8")
        _run(folder)
        both = [torch.load(folder / f"{i}.pt") for i in range(2)]
    for case, first, second in zip(cases, *both, strict=True):
        if "error" in first or "error" in second:
            raise AssertionError(f"in two processes {first.get('error') or second.get('error')}")
        _compare(case, first["weights"], second["weights"])


def _compare(case: Case, first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    with own_randomness():
        begun = {name: value.clone() for name, value in _tensors(case.build()).items()}
        alone = train(case)
    for name, value in first.items():
        apart = not torch.equal(value, second[name])
        assert not apart, f"{name} is not the same in both processes: okdc.ranks.gather what fills it"
    far = {n: _apart(alone[n], first[n], begun[n]) for n in alone if alone[n].is_floating_point() and alone[n].numel()}
    worst = max(far, key=lambda name: far[name])
    assert far[worst] <= TOLERANCE, (
        f"two processes with half a batch each change {worst} otherwise than one with all of it (by {far[worst]:.0%} "
        "of the change): losses that compare images take those of all processes, okdc.ranks.gather"
    )


def _apart(alone: Tensor, shared: Tensor, begun: Tensor) -> float:
    """How far two tensors are apart, as a share of how far one moved."""
    return ((alone - shared).abs().max() / (alone - begun).abs().max().clamp_min(1e-4)).item()


def train(case: Case) -> dict[str, Tensor]:
    """Weights and buffers after a few steps on this process's part of each batch."""
    method = case.build()
    method.begin_epoch(1, 2)
    optimizer, forward = case.optimizer(method), wrapped(method, torch.device("cpu"))
    for step in range(STEPS):
        method.lr.fill_(0.05)
        method.train()
        for module in method.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        batch = case.batch(method, BATCH, seed=step)
        part = (batch[0].chunk(world(), -4)[rank()], *(each.chunk(world())[rank()] for each in batch[1:]))
        seed_everything(0, step, rank=rank())
        parts = forward(*part)
        optimizer.zero_grad()
        torch.stack([value for value in parts.values() if value.requires_grad]).sum().backward()
        method.before_step()
        optimizer.step()
        method.after_step([part])
    return _tensors(method)


def _tensors(method: Method) -> dict[str, Tensor]:
    return {name: value for name, value in method.state_dict().items() if isinstance(value, Tensor)}


def _run(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path])), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2",
    }  # fmt: skip
    line = [sys.executable, "-m", "okdc.testing.processes", str(folder)]
    pipe: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(line, env=common | {"RANK": str(i), "LOCAL_RANK": str(i)}, **pipe) for i in range(2)]
    try:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process of two ended with {process.returncode}:\n{text}")


def main(folder: str) -> None:
    """Train every case as one of two processes; an error of a case is told beside the weights of others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = [_tried(Case(**told)) for told in json.loads(Path(folder, "cases.json").read_text(encoding="utf-8"))]
        torch.save(found, Path(folder, f"{rank()}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _tried(case: Case) -> dict[str, Any]:
    try:
        return {"weights": train(case)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main(sys.argv[1])
