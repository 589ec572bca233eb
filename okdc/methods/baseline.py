"""Trains your network alone, with labels. A gain is measured against it.

Use it when you want to know whether a method helps: train it with the same settings. A report shows the difference to a
baseline that lies beside it, and `okdc compare` trains one by itself.

Paper: There is none.
Code: There is none.
Differs: It is trained exactly like a method: same data, schedule, seed and loop.
Costs: One network.
"""

from __future__ import annotations

from torch import Tensor

from okdc.cohort import CohortOutput
from okdc.methods.shared.base import Method


class Baseline(Method):
    """Cross entropy of the target."""

    members = 1
    compares = False
    tasks = ("classify", "multilabel", "pose")

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        return {"ce/target": self.task.supervised(out.logits[0], labels)}
