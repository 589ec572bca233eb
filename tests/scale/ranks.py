"""What the contrast of mcl and lmcl takes on each of several ranks: CPU seconds and memory, for one whole batch.

    python tests/scale/ranks.py [ANCHORS [RANKS ...]]

Processes with gloo on this machine; two networks of one tap, width 128, forward and backward.
"""

from __future__ import annotations

import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from okdc.methods.shared.contrast import mutual_contrast
from tests.scale.measuring import Cost, _measured, table


def contrast(rank: int, ranks: int, anchors: int, port: int, answers: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    own = [torch.randn(1, anchors // ranks, 128).requires_grad_() for _ in range(2)]
    labels = torch.randint(anchors // 4, (anchors // ranks,))

    def step() -> None:
        units = [torch.nn.functional.normalize(each, dim=2) for each in own]
        torch.stack(list(mutual_contrast(units, labels, tau=0.1, temperature=3.0))).sum().backward()

    answers.put(_measured(step, 3))
    if ranks > 1:
        dist.destroy_process_group()


def row(ranks: int, anchors: int) -> tuple[str, ...]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    answers = mp.get_context("spawn").SimpleQueue()
    mp.spawn(contrast, (ranks, anchors, port, answers), nprocs=ranks)  # type: ignore[no-untyped-call]
    found = [Cost(*answers.get()) for _ in range(ranks)]
    seconds, megabytes = (max(values) for values in zip(*found))
    return f"{anchors:,}", str(ranks), f"{seconds:.2f}", f"{megabytes:.0f}"


if __name__ == "__main__":
    whole, *several = map(int, sys.argv[1:] or (2048,))
    head = ("anchors", "ranks", "CPU s a step and rank", "MB a rank")
    table(head, (row(ranks, whole) for ranks in several or (1, 2, 4, 8)))
