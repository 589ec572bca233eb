"""How large the target's first gradient is, of a method's losses and of plain training, both on the same noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from okdc.methods.shared.trial import batch_of, gradients, undone
from okdc.needs import NOTHING, Needs

if TYPE_CHECKING:
    from okdc.methods.shared.base import Method


class FirstGradients(NamedTuple):
    """Norms over all of the target's parameters that learn, before the first step."""

    plain: float
    method: float

    @property
    def ratio(self) -> float:
        """How many times larger the step of the target is than in plain training, while nothing is clipped."""
        return self.method / self.plain if self.plain else 1.0


def first_gradients(method: Method, needs: Needs = NOTHING) -> FirstGradients:
    """One pass forward and back of the target alone, and one of the method, which is left as it was."""
    learning = [p for p in method.parameters() if p.requires_grad]
    target = {id(p) for p in method.cohort.target.parameters()}

    def norm(loss: Tensor) -> float:
        pairs = zip(learning, gradients(loss, learning), strict=True)
        sizes = [found.float().norm() for p, found in pairs if found is not None and id(p) in target]
        return torch.stack(sizes).norm().item() if sizes else 0.0

    with undone(method):
        images, labels, *_ = batch = batch_of(method, needs)
        views = images.dim() > 1 + len(method.cohort.anatomy.input_size)
        method.train()
        logits = method.cohort.target(images[0] if views else images)
        plain = norm(method.task.supervised(logits, labels))
        parts = [part.float() for part in method(*batch).values() if part.requires_grad]
        return FirstGradients(plain, norm(torch.stack(parts).sum()))
