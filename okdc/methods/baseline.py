"""The target alone, trained with labels: the control that every gain in a report is measured against.

Paper: none.
Code: none.
Differs: it is trained exactly like a method: same data, schedule, seed and loop.
Costs: one target.
"""

from __future__ import annotations

from torch import Tensor

from okdc.cohort import CohortOutput
from okdc.methods.shared.base import Method


class Baseline(Method):
    """Cross entropy of the target."""

    members = 1
    tasks = ("classify", "multilabel")

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        return {"ce/target": self.task.supervised(out.logits[0], labels)}
