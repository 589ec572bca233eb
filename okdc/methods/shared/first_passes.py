"""The target alone and the method, forward and back on the same noise before training: gradients, and how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from okdc.methods.shared.trial import IMAGES, batch_of, gradients, undone
from okdc.needs import NOTHING, Needs

if TYPE_CHECKING:
    from okdc.methods.shared.base import Method

Loss = Callable[[], Tensor]
_STEPS = 3  # of which the fastest counts: the first one also sets up what the arithmetic needs
_SHORT = 1.0  # seconds for a step of whole batches, up to which such steps are timed


class FirstGradients(NamedTuple):
    """Norms over all of the target's parameters that learn, before the first step."""

    plain: float
    method: float

    @property
    def ratio(self) -> float:
        """How many times larger the step of the target is than in plain training, while nothing is clipped."""
        return self.method / self.plain if self.plain else 1.0


def first_gradients(method: Method, needs: Needs = NOTHING) -> FirstGradients:
    """How large the target's gradient is in plain training, and of the method's losses; it is left as it was."""
    target = {id(p) for p in method.cohort.target.parameters()}
    learning = _learning(method)

    def norm(loss: Tensor) -> float:
        pairs = zip(learning, gradients(loss, learning), strict=True)
        sizes = [found.float().norm() for p, found in pairs if found is not None and id(p) in target]
        return torch.stack(sizes).norm().item() if sizes else 0.0

    with _losses(method, needs) as (alone, together, _):
        return FirstGradients(norm(alone()), norm(together()))


def pace(method: Method, needs: Needs = NOTHING, batch: int = IMAGES) -> tuple[float, float]:
    """Seconds that an image takes forward and back, in the target alone and in the method, which is left as it was.

    In batches of `batch` images where these are soon computed; in small ones, most time may not be that of the images.
    """
    found = _pace(method, needs, IMAGES)
    return _pace(method, needs, batch) if batch * sum(found) < _SHORT else found


def _pace(method: Method, needs: Needs, size: int) -> tuple[float, float]:
    with _losses(method, needs, size) as (alone, together, images):
        return _seconds(method, alone) / images, _seconds(method, together) / images


def _learning(method: Method) -> list[torch.nn.Parameter]:
    return [p for p in method.parameters() if p.requires_grad]


@contextmanager
def _losses(method: Method, needs: Needs, size: int = IMAGES) -> Iterator[tuple[Loss, Loss, int]]:
    """What runs the target alone and what runs the method, each to its loss, and the number of images."""
    with undone(method):
        images, labels, *_ = batch = batch_of(method, needs, size)
        given = images[0] if images.dim() > 1 + len(method.cohort.anatomy.input_size) else images
        method.train()

        def alone() -> Tensor:
            return method.task.supervised(method.cohort.target(given), labels)

        def together() -> Tensor:
            return torch.stack([part.float() for part in method(*batch).values() if part.requires_grad]).sum()

        yield alone, together, len(labels)


def _seconds(method: Method, loss: Loss) -> float:
    """Those of the fastest of a few steps.

    The time of the processor counts where it is less than that on the clock: there, other programs were busy.
    """
    learning, taken = _learning(method), []
    for _ in range(_STEPS):
        began, used = time.perf_counter(), time.process_time()
        gradients(loss(), learning)
        taken.append(min(time.perf_counter() - began, time.process_time() - used))
    return min(taken)
