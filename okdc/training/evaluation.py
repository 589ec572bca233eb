"""How good every member, the ensemble and the student are on the validation images."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.errors import DataError
from okdc.ranks import world
from okdc.system.signals import StopSignal
from okdc.tasks import confusion
from okdc.training.machine import Machine
from okdc.training.state import TrainState


@torch.no_grad()
def evaluate(
    state: TrainState, validation: Any, machine: Machine, stop: StopSignal
) -> tuple[dict[str, float], Tensor | None]:
    """Top-1 of every member, of the ensemble and of the student, per cent, in eval mode; partial after a signal.

    Also the student's counts of which class was taken for which (`tasks.confusion`); ({}, None) without images.
    """
    # Not inference_mode: a network that caches tensors, say position embeddings, could then not train on.
    state.method.eval()
    names = [*(f"top1/{name}" for name in state.method.cohort.names), "top1/ensemble", "eval_top1"]
    classes = state.method.cohort.anatomy.num_classes
    total, sums, cells = 0, torch.zeros(len(names) + 2, dtype=torch.float64), []
    for images, labels in takewhile(lambda _: not stop.signal, validation):
        images, labels = machine.move(images, labels)
        with machine.autocast():
            out = state.method.cohort(images)
            ensemble = state.method.ensemble(out)
            student = out.logits[0] if state.student is state.method.cohort.target else state.student(images)
        counts = [(logits.argmax(1) == labels).sum() for logits in (*out.logits, ensemble, student)]
        top5 = student.topk(min(5, student.shape[1])).indices.eq(labels[:, None]).sum()
        loss = F.cross_entropy(student.float(), labels, reduction="sum")
        told = torch.stack([*counts, top5, loss]), confusion.cells(student.argmax(1), labels, classes)
        got = torch.cat([part.double() for part in told]).cpu()  # the one transfer
        sums += got[: len(sums)]
        cells.append(got[len(sums) :].long())
        total += len(images)
    table = _counted(cells, classes)
    if world() > 1:
        sums, table, total = _of_all_ranks(sums, table, total, machine, stop)
    if not total and state.best is not None and not stop.wish:  # it did give some before
        raise DataError("the validation data gave no images this time; give a loader that can be read anew each epoch.")
    if not total:
        return {}, None
    means = dict(zip([*names, "eval_top5", "eval_loss"], (sums / total).tolist()))
    metrics = {name: value if name == "eval_loss" else 100 * value for name, value in means.items()}
    return metrics | {"eval_balanced": confusion.balanced(table)}, table


@torch.no_grad()
def judge(
    network: nn.Module, images: Iterable[tuple[Tensor, Tensor]], machine: Machine
) -> tuple[dict[str, float], Tensor]:
    """Top-1, top-5 and balanced accuracy of a network alone, per cent, and its counts (`tasks.confusion`)."""
    network.eval().to(machine.device)
    right5, cells, classes = 0, [], 0
    for batch, labels in images:
        batch, labels = machine.move(batch, labels)
        with machine.autocast():
            logits = network(batch)
        classes = logits.shape[1]
        right5 += int(logits.topk(min(5, classes)).indices.eq(labels[:, None]).sum())
        cells.append(confusion.cells(logits.argmax(1), labels, classes).cpu())
    table = _counted(cells, classes)
    top5 = 100 * right5 / int(table.sum())
    return {"top1": confusion.top1(table), "top5": top5, "balanced": confusion.balanced(table)}, table


def _counted(cells: list[Tensor], classes: int) -> Tensor:
    """The counts (C, columns) of images by cell, from the cells of all batches."""
    columns = confusion.columns(classes)
    every = torch.cat(cells) if cells else torch.zeros(0, dtype=torch.int64)
    return torch.bincount(every, minlength=classes * columns).view(classes, columns).int()


def _of_all_ranks(
    sums: Tensor, table: Tensor, total: int, machine: Machine, stop: StopSignal
) -> tuple[Tensor, Tensor, int]:
    told = torch.cat([sums, table.flatten().double(), sums.new_tensor([total])])
    added = world() * sums.new_tensor(stop.agree(told.to(machine.device)))
    counts = added[len(sums) : -1].round().int().view_as(table)
    return added[: len(sums)], counts, round(added[-1].item())
