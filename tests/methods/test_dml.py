"""DML against the numbers of a published trainer and of OKDDip's port (tests/golden/kd_dml_dml, okddip_dml)."""

from __future__ import annotations

import pytest
import torch

from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.methods.dml import Dml
from tests.helpers.networks import Tiny, Tokens
from tests.methods.golden import assert_same, load


def method(peers: int, **settings: object) -> Dml:
    return Dml(Cohort(Tiny(), torch.randn(2, 3, 32, 32), [Branch()] * (peers - 1)), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["T", "T1"])
def test_losses_and_gradients(key: str) -> None:
    t, meta = load("kd_dml_dml")
    expected = meta["expected"][key]
    dml = method(3, temperature=expected["temperature"])
    logits = t["logits"].requires_grad_()
    parts = dml.losses(CohortOutput(tuple(logits)), t["y"])
    for name, ce in zip(dml.cohort.names, expected["ce_per_net"], strict=True):
        assert_same(parts[f"ce/{name}"], ce)
    assert_same(sum(v for k, v in parts.items() if k.startswith("ce/")), expected["ce_sum"])
    assert_same(sum(v for k, v in parts.items() if k.startswith("kl/")), expected["kl_sum"])
    total = sum(parts.values())
    assert_same(total, expected["loss"])
    total.backward()
    assert_same(logits.grad, t[f"grad_logits_{key}"], 2e-6)


@pytest.mark.parametrize(("target", "key"), [("each", "pairwise"), ("mean", "meanlogit")])
def test_targets_that_learn_too(target: str, key: str) -> None:
    t, meta = load("kd_dml_dml")
    expected = meta["alt"][key]
    dml = method(3, temperature=expected["temperature"], target=target, eps=1e-7, detach_teacher=False)
    logits = t["logits"].requires_grad_()
    total = sum(dml.losses(CohortOutput(tuple(logits)), t["y"]).values())
    assert_same(total, expected["loss"])
    total.backward()
    assert_same(logits.grad, t[f"alt_grad_logits_{key}"], 2e-6)


@pytest.mark.parametrize(("target", "name"), [("each", "pairwise"), ("mean", "ensemble_first")])
@pytest.mark.parametrize("mode", ["nodetach", "detach"])
def test_the_port_of_okddip(mode: str, target: str, name: str) -> None:
    t, meta = load("okddip_dml")
    dml = method(4, temperature=3.0, target=target, eps=1e-7, detach_teacher=mode == "detach")
    logits = t["logits"].requires_grad_()
    parts = dml.losses(CohortOutput(logits.unbind(2)), t["labels"])
    for i, member in enumerate(dml.cohort.names):
        assert_same(parts[f"ce/{member}"], t["expected.ce"][i])
        pairs = t["expected.kd.pairwise"][i]  # its own entry, the divergence from itself, is not part of the mean
        taught = pairs[[j for j in range(4) if j != i]].mean() if target == "each" else None
        assert_same(parts[f"kl/{member}"], t["expected.kd.leave_one_out_mean"][i] if taught is None else taught)
    total = sum(parts.values())
    assert_same(total, meta["expected"][f"{name}.total"])
    assert_same(total, t[f"expected.loss.{name}.total"])
    total.backward()
    assert_same(logits.grad, t[f"expected.grad.{name}.{mode}.logits"])


def test_peers_of_another_architecture() -> None:
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    dml = Dml(Cohort(Tiny(), images, Dml.plan(None, peers=[Tokens()])))  # type: ignore[arg-type]
    parts = dml(images, labels)
    sum(parts.values()).backward()
    assert set(parts) == {"ce/target", "kl/target", "ce/peer1", "kl/peer1"}
    assert parts["kl/target"] > 0 and all(p.grad is not None for p in dml.parameters())
