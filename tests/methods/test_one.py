"""ONE against the numbers of the authors' own code and of OKDDip's variant (tests/golden/one_*), in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.losses import kl, rampup
from okdc.methods.one import One
from tests.helpers.networks import Tiny
from tests.methods.golden import assert_same, load


def method(members: int, **settings: object) -> One:
    branches = [Branch("early") for _ in range(members - 1)]
    one = One(
        Cohort(Tiny(width=16), torch.randn(2, 3, 32, 32), branches, taps=One.taps), **{"rampup_epochs": 80} | settings
    )  # type: ignore[arg-type]
    assert one.gate.fc.in_features == 32
    return one.double()


def with_golden_gate(one: One, t: dict[str, Tensor]) -> One:
    for name, parameter in one.gate.named_parameters():
        parameter.data = t[f"gate.{name}"].clone()
    return one.train()


def inputs(t: dict[str, Tensor], members: int) -> tuple[CohortOutput, list[Tensor]]:
    """Logits (which keep their gradient) of linear classifiers on pooled features, and those features."""
    pooled = [t[f"pooled.{i}"].requires_grad_() for i in range(members)]
    logits = [x @ t[f"classifier.{i}.weight"].T + t[f"classifier.{i}.bias"] for i, x in enumerate(pooled)]
    for z in logits:
        z.retain_grad()
    return CohortOutput(tuple(logits), shared=t["shared_feature"].requires_grad_()), pooled


@pytest.mark.parametrize("row", [0, 1])
def test_losses_and_gradients(row: int) -> None:
    t, meta = load("one_losses")
    one, expected = method(3), meta["expected"]
    epoch = meta["hyper"]["epochs"][row]
    one.epoch.fill_(epoch)
    assert_same(torch.tensor(epoch).double(), t["ramp.epoch"][row])
    assert_same(rampup(one.epoch, one.rampup_epochs), t["ramp.weight"][row])
    branches, ensemble = [t[f"logits.{i}"].requires_grad_() for i in range(3)], t["ensemble"].requires_grad_()
    parts = one.ensemble_losses(branches, ensemble, t["labels"])
    for i, name in enumerate(one.cohort.names):
        assert_same(parts[f"ce/{name}"], t["expected.ce.branch"][i])
        assert_same(kl(branches[i], ensemble, 3.0, eps=1e-7), t["expected.kd.branch_from_ensemble"][i])
        assert_same(kl(branches[i], ensemble, 3.0), t["expected.kd_eps0.branch_from_ensemble"][i])
    assert_same(parts["ce/ensemble"], t["expected.ce.ensemble"])
    ce, kd = (sum(v for k, v in parts.items() if k.startswith(kind)) for kind in ("ce/", "kd/"))
    for key, got in {"ce": ce, "kd": kd, "total": sum(parts.values())}.items():
        assert_same(got, expected[f"r{row}.{key}"])
        assert_same(got, t[f"expected.loss.r{row}.{key}"])
    sum(parts.values()).backward()
    assert_same(ensemble.grad, t[f"expected.grad.r{row}.ensemble"])
    for i, leaf in enumerate(branches):
        assert_same(leaf.grad, t[f"expected.grad.r{row}.logits.{i}"])


def test_gate_and_gradients_through_it() -> None:
    t, meta = load("one_gate")
    one = with_golden_gate(method(3), t)
    one.epoch.fill_(meta["hyper"]["epoch"])
    assert_same(rampup(one.epoch, one.rampup_epochs), meta["expected"]["ramp_weight"])
    out, pooled = inputs(t, 3)
    weights = one.gate(out.shared)
    assert_same(weights, t["expected.train.gate"])
    one.gate.bn.reset_running_stats()
    ensemble = one.ensemble(out)
    ensemble.retain_grad()
    assert_same(ensemble, t["expected.train.ensemble"])
    parts = one.ensemble_losses(out.logits, ensemble, t["labels"])
    assert_same(sum(v for k, v in parts.items() if k.startswith("ce/")), meta["expected"]["ce"])
    assert_same(sum(v for k, v in parts.items() if k.startswith("kd/")), meta["expected"]["kd"])
    assert_same(sum(parts.values()), meta["expected"]["total"])
    sum(parts.values()).backward()
    assert_same(ensemble.grad, t["expected.grad.ensemble"])
    assert_same(out.shared.grad, t["expected.grad.shared_feature"])
    for i in range(3):
        assert_same(out.logits[i], t[f"expected.train.logits.{i}"])
        assert_same(out.logits[i].grad, t[f"expected.grad.logits.{i}"])
        assert_same(pooled[i].grad, t[f"expected.grad.pooled.{i}"])
    for name, parameter in one.gate.named_parameters():
        if name == "fc.bias":  # before a batch norm: exactly zero up to rounding
            assert parameter.grad.abs().max() < 1e-12 and t["expected.grad.gate.fc.bias"].abs().max() < 1e-12
        else:
            assert_same(parameter.grad, t[f"expected.grad.gate.{name}"])
    assert_same(one.gate.bn.running_mean, t["expected.buffers.gate.bn.running_mean"])
    assert_same(one.gate.bn.running_var, t["expected.buffers.gate.bn.running_var"])
    one.eval()
    assert_same(one.gate(out.shared), t["expected.eval.gate"])
    assert_same(one.ensemble(out), t["expected.eval.ensemble"])


@pytest.mark.parametrize("mode", ["detach", "nodetach"])
def test_the_variant_of_okddip(mode: str) -> None:
    t, meta = load("okddip_one_variant")
    one = with_golden_gate(method(4, detach_teacher=mode == "detach"), t)
    one.epoch.fill_(meta["hyper"]["epoch"])
    out, _ = inputs(t, 4)
    ensemble = one.ensemble(out)
    ensemble.retain_grad()
    assert_same(torch.stack(out.logits, 2), t["expected.logits"])
    assert_same(ensemble, t["expected.ensemble"])
    parts, expected = one.ensemble_losses(out.logits, ensemble, t["labels"]), meta["expected"]
    ramp = rampup(one.epoch, one.rampup_epochs)
    assert_same(ramp, expected["ramp_weight"])
    assert_same(sum(v for k, v in parts.items() if k.startswith("ce/")), expected["ce"])
    assert_same(sum(v for k, v in parts.items() if k.startswith("kd/")) / ramp, expected["kd_unweighted"])
    assert_same(sum(parts.values()), expected["total"])
    sum(parts.values()).backward()
    grads = {"ensemble": ensemble.grad, "logits": torch.stack([z.grad for z in out.logits], 2)}
    grads |= {"shared_feature": out.shared.grad, "gate.fc.weight": one.gate.fc.weight.grad}
    for key, grad in grads.items():
        assert_same(grad, t[f"expected.grad.{mode}.{key}"])


def test_rampup() -> None:
    t, meta = load("one_rampup")
    assert t["epoch"].tolist() == meta["hyper"]["epochs"]
    assert_same(torch.stack([rampup(e.double(), method(2).rampup_epochs) for e in t["epoch"]]), t["weight"])
    assert rampup(torch.zeros(()), 0) == 1
