"""How long an image takes in training, tried on noise before a run begins."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from okdc.methods.shared.trial import batch_of, gradients, undone
from okdc.needs import NOTHING, Needs

if TYPE_CHECKING:
    from okdc.methods.shared.base import Method


def pace(method: Method, needs: Needs = NOTHING) -> tuple[float, float]:
    """Seconds that an image takes forward and back, in the target alone and in the method, which is left as it was."""
    learning = [p for p in method.parameters() if p.requires_grad]
    with undone(method):
        images, labels, *_ = batch = batch_of(method, needs)
        given = images[0] if images.dim() > 1 + len(method.cohort.anatomy.input_size) else images
        method.train()

        def alone() -> Tensor:
            return method.task.supervised(method.cohort.target(given), labels)

        def together() -> Tensor:
            return torch.stack([part.float() for part in method(*batch).values() if part.requires_grad]).sum()

        plain, whole = (_seconds(lambda loss=loss: gradients(loss(), learning)) for loss in (alone, together))  # type: ignore[misc]
    return plain / len(labels), whole / len(labels)


def _seconds(step: Callable[[], object]) -> float:
    """Those of the faster of two steps: the first one also sets up what the arithmetic needs.

    The time of the processor counts where it is less than that on the clock: there, other programs were busy.
    """
    taken = []
    for _ in range(2):
        began, used = time.perf_counter(), time.process_time()
        step()
        taken.append(min(time.perf_counter() - began, time.process_time() - used))
    return min(taken)
