"""DML against the numbers of a published trainer (tests/golden/kd_dml_dml), in float64."""

from __future__ import annotations

import pytest
import torch

from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.methods.dml import Dml
from tests.methods.golden import assert_same, load
from tests.networks import Tiny, Tokens


@pytest.mark.parametrize("key", ["T", "T1"])
def test_losses_and_gradients(key: str) -> None:
    t, meta = load("kd_dml_dml")
    expected = meta["expected"][key]
    cohort = Cohort(Tiny(), torch.randn(2, 3, 32, 32), [Branch(), Branch()])
    dml = Dml(cohort, temperature=expected["temperature"])
    logits = t["logits"].requires_grad_()
    parts = dml.losses(CohortOutput(tuple(logits)), t["y"])
    for name, ce in zip(cohort.names, expected["ce_per_net"], strict=True):
        assert_same(parts[f"ce/{name}"], ce)
    assert_same(sum(v for k, v in parts.items() if k.startswith("kl/")), expected["kl_sum"])
    total = sum(parts.values())
    assert_same(total, expected["loss"])
    total.backward()
    assert_same(logits.grad, t[f"grad_logits_{key}"], 2e-6)


def test_peers_of_another_architecture() -> None:
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    dml = Dml(Cohort(Tiny(), images, Dml.plan(None, peers=[Tokens()])))  # type: ignore[arg-type]
    parts = dml(images, labels)
    sum(parts.values()).backward()
    assert set(parts) == {"ce/target", "kl/target", "ce/branch1", "kl/branch1"}
    assert parts["kl/target"] > 0 and all(p.grad is not None for p in dml.parameters())
