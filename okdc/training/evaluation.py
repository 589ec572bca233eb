"""How good every member, the ensemble and the student are on the validation images, as their task scores them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from okdc import tasks
from okdc.errors import DataError
from okdc.ranks import world
from okdc.system.signals import StopSignal
from okdc.tasks.task import Task
from okdc.training.machine import Machine
from okdc.training.state import TrainState


@torch.no_grad()
def evaluate(
    state: TrainState, validation: Any, machine: Machine, stop: StopSignal
) -> tuple[dict[str, float], Tensor | None]:
    """The scores of the student, and the task's metric of every member and the ensemble; partial after a signal.

    Also what the task remembers of the student's outputs for the report; ({}, None) without images.
    """
    # Not inference_mode: a network that caches tensors, say position embeddings, could then not train on.
    state.method.eval()
    task, cohort = state.method.task, state.method.cohort
    names = [*state.method.learners, "ensemble"]
    scorer = task.scorer(cohort.anatomy.num_classes, len(names))
    for images, labels in takewhile(lambda _: not stop.signal, validation):
        images, labels = machine.move(images, labels)
        with machine.autocast():
            out = cohort(images)
            said, ensemble = state.method.said(out), state.method.ensemble(out)
            student = out.logits[0] if state.student is cohort.target else task.result(state.student(images))
        scorer.update(student, labels, (*said, ensemble))
    if world() > 1:
        scorer.add_up(lambda told: world() * told.new_tensor(stop.agree(told.to(machine.device))))
    # Where it did give some before.
    if not scorer.images and state.best is not None and not stop.wish:
        raise DataError("the validation data gave no images this time; give a loader that can be read anew each epoch.")
    if not scorer.images:
        return {}, None
    others = {f"{task.metric}/{name}": value for name, value in zip(names, scorer.others(), strict=True)}
    return others | {f"eval_{name}": value for name, value in scorer.value().items()}, scorer.counts()


@torch.no_grad()
def judge(
    network: nn.Module, images: Iterable[tuple[Tensor, Tensor]], machine: Machine, task: Task | None = None
) -> tuple[dict[str, float], Tensor]:
    """The scores of a network alone, and what its task remembers of its outputs for the report."""
    network.eval().to(machine.device)
    task = task or tasks.get()
    scorer: Any = None
    for batch, labels in images:
        batch, labels = machine.move(batch, labels)
        with machine.autocast():
            out = task.result(network(batch))
        scorer = scorer or task.scorer(out.shape[1])
        scorer.update(out, labels)
    values = scorer.value()
    return {name: values[name] for name in task.metrics if name in values}, scorer.counts()
