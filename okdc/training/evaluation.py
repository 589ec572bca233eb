"""How good every member, the ensemble and the student are on the validation images."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from okdc.errors import DataError
from okdc.ranks import world
from okdc.system.signals import StopSignal
from okdc.training.machine import Machine
from okdc.training.state import TrainState


@torch.no_grad()
def evaluate(state: TrainState, validation: Any, machine: Machine, stop: StopSignal) -> dict[str, float]:
    """Top-1 of every member, of the ensemble and of the student, per cent, in eval mode; partial after a signal."""
    # Not inference_mode: a network that caches tensors, say position embeddings, could then not train on.
    state.method.eval()
    names = [*(f"top1/{name}" for name in state.method.cohort.names), "top1/ensemble", "eval_top1"]
    total, sums = 0, torch.zeros(len(names) + 2, dtype=torch.float64)
    for images, labels in takewhile(lambda _: not stop.signal, validation):
        images, labels = machine.move(images, labels)
        with machine.autocast():
            out = state.method.cohort(images)
            ensemble = state.method.ensemble(out)
            student = out.logits[0] if state.student is state.method.cohort.target else state.student(images)
        counts = [(logits.argmax(1) == labels).sum() for logits in (*out.logits, ensemble, student)]
        top5 = student.topk(min(5, student.shape[1])).indices.eq(labels[:, None]).sum()
        loss = F.cross_entropy(student.float(), labels, reduction="sum")
        sums += torch.stack([*counts, top5, loss]).cpu()
        total += len(images)
    if world() > 1:
        sums, total = _of_all_ranks(sums, total, machine, stop)
    if not total and state.best is not None and not stop.wish:  # it did give some before
        raise DataError("the validation data gave no images this time; give a loader that can be read anew each epoch.")
    if not total:
        return {}
    means = dict(zip([*names, "eval_top5", "eval_loss"], (sums / total).tolist()))
    return {name: value if name == "eval_loss" else 100 * value for name, value in means.items()}


def _of_all_ranks(sums: Tensor, total: int, machine: Machine, stop: StopSignal) -> tuple[Tensor, int]:
    means = stop.agree(torch.cat([sums, sums.new_tensor([total])]).to(machine.device))
    return world() * sums.new_tensor(means[:-1]), round(world() * means[-1])
