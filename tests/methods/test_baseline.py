"""The control is plain cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from okdc.cohort import Cohort
from okdc.methods.baseline import Baseline
from tests.helpers.networks import Tiny


def test_is_the_target_alone() -> None:
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    target = Tiny().eval()
    method = Baseline(Cohort(target, images, Baseline.plan(None)))  # type: ignore[arg-type]
    parts = method.eval()(images, labels)
    assert len(method.cohort) == 1 and set(parts) == {"ce/target"}
    torch.testing.assert_close(parts["ce/target"], F.cross_entropy(target(images), labels))
