"""What a task finds out after training, on images of the training side, for its bundle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from okdc.data import Data, in_order
from okdc.tasks.task import Task
from okdc.training.machine import Machine

ENOUGH = 10_000  # training images, where none were set aside to judge with


@torch.no_grad()
def settle(task: Task, network: nn.Module, data: Data, machine: Machine) -> None:
    """Show the task what the network gives for images that were set aside (`holdout`), else for training images.

    Those of okdc's own data are prepared as for evaluation; a user's loader gives them as it trains on them.
    """
    batches: Iterable[Any] = data.validation if data.test is not None and data.validation else in_order(data, ENOUGH)
    network.eval().to(machine.device)
    outs: list[Tensor] = []
    truth: list[Tensor] = []
    for images, labels in batches:
        images, labels = machine.move(images, labels)
        with machine.autocast():
            outs.append(network(images).float().cpu())
        truth.append(labels.cpu())
    task.settle(torch.cat(outs), torch.cat(truth))
