"""KDCL against an independent float64 implementation of its formulas (tests/golden/kdcl)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.methods.kdcl import Kdcl, best_mixture, joint_errors, least_error, linear, minlogit, naive
from tests.helpers.networks import Tiny
from tests.methods.golden import assert_same, load

VARIANTS = ("naive", "linear", "minlogit", "general")


def method(members: int = 3, **settings: object) -> Kdcl:
    torch.manual_seed(0)
    return Kdcl(Cohort(Tiny(), torch.randn(2, 3, 32, 32), [Branch()] * (members - 1)), **settings)  # type: ignore[arg-type]


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return F.one_hot(labels, 10).double()


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients(variant: str) -> None:
    t, meta = load("kdcl")
    expected = meta["variants"][variant]
    kdcl = method(soft_target=variant, temperature=meta["T"], weight=meta["lam"]).double()
    kdcl.mixture.copy_(t["general_w"])
    logits = tuple(t[f"z{i}"].requires_grad_() for i in range(meta["m"]))
    parts = kdcl.losses(CohortOutput(logits), t["labels"])
    # The simplex solver stops a little before the exact optimum.
    exact = variant != "linear"
    taught = kdcl.teach(logits, t["labels"])
    assert_same(taught, t[f"teacher_{variant}"], 1e-6 if exact else 1e-4)
    assert_same(F.cross_entropy(taught, t["labels"]), expected["teacher_ce"], 1e-6)
    for i, name in enumerate(kdcl.cohort.names):
        assert_same(parts[f"ce/{name}"], expected["ce"][i])
        assert_same(parts[f"kd/{name}"], expected["kd"][i], 1e-6 if exact else 1e-4)
    assert_same(sum(parts.values()), expected["total"], 1e-6 if exact else 1e-4)
    sum(parts.values()).backward()
    for i, leaf in enumerate(logits):
        assert_same(leaf.grad, t[f"dz{i}_{variant}"], 1e-6 if exact else 1e-4)


def test_choices_of_each_generator() -> None:
    t, _ = load("kdcl")
    logits, labels = torch.stack([t[f"z{i}"] for i in range(3)]), one_hot(t["labels"])
    for i, choice in enumerate(t["naive_choice"].tolist()):
        assert torch.equal(naive(logits, labels)[i], logits[choice, i])
    assert_same(best_mixture(logits, labels), t["linear_alpha"], 1e-3)
    assert_same(best_mixture(logits.float(), labels.float()), t["linear_alpha"], 1e-3)
    converged = best_mixture(logits, labels, steps=60, barrier=1e-10)
    assert_same(converged, t["linear_alpha"])
    assert_same(torch.einsum("bm,mbc->bc", converged, logits), t["teacher_linear"])
    assert torch.equal(minlogit(logits, labels).gather(1, t["labels"][:, None]), torch.zeros(8, 1).double())


def test_weights_of_general() -> None:
    t, meta = load("kdcl")
    logits, labels = torch.stack([t[f"zval{i}"] for i in range(3)]), one_hot(t["labels_val"])
    errors, true_class = joint_errors(logits, labels) / 40, joint_errors(logits, labels, True) / 40
    assert_same(errors, t["general_C"])
    assert_same(errors, torch.tensor(meta["general"]["C"]).double())
    assert_same(least_error(errors, ridge=0), t["general_w"])
    assert_same(least_error(errors, ridge=0), torch.tensor(meta["general"]["w"]).double())
    assert_same(true_class, torch.tensor(meta["general"]["C_targetprob"]).double())
    assert_same(least_error(true_class, ridge=0), t["general_w_targetprob"])
    assert_same(least_error(errors), t["general_w"], 1e-5)  # the ridge is next to nothing
    assert torch.isfinite(least_error(torch.ones(3, 3).double())).all()  # networks that err alike


@pytest.mark.parametrize("scale", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("members", [2, 4])
def test_mixture_is_a_mixture_and_beats_every_member(members: int, scale: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(members, 64, 40) * scale, F.one_hot(torch.arange(64) % 40, 40).float()
    alpha = best_mixture(logits, labels)
    assert (alpha >= 0).all()
    torch.testing.assert_close(alpha.sum(1), torch.ones(64))
    ce = -(F.log_softmax(linear(logits, labels), 1) * labels).sum(1)
    best = -(F.log_softmax(logits, 2) * labels).sum(2).amin(0)
    assert (ce <= best + 1e-3 * scale).all()
    minimum = -(F.log_softmax(minlogit(logits, labels), 1) * labels).sum(1)
    assert (minimum <= best + 1e-5 * scale).all()


@pytest.mark.parametrize("error", ["probabilities", "true_class"])
def test_general_is_measured_on_images_set_aside(error: str) -> None:
    assert Kdcl.needs(soft_target="general").held_out and not Kdcl.needs().held_out and Kdcl.needs().views
    kdcl = method(soft_target="general", error=error).eval()
    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10) % 4
    held_out = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    with torch.no_grad():
        kdcl.before_epoch(held_out)
        assert torch.equal(kdcl.mixture, torch.full((3,), 1 / 3))  # before the first epoch they know nothing
        kdcl.epoch.fill_(1)
        kdcl.before_epoch(held_out)
        logits = torch.stack(kdcl.cohort(images).logits)
    wrong = F.softmax(logits, 2) - F.one_hot(labels, 4)
    if error == "true_class":
        wrong = wrong[:, torch.arange(10), labels].unsqueeze(2)
    mixed = torch.einsum("m,mnc->nc", kdcl.mixture, wrong).square().sum()
    torch.testing.assert_close(kdcl.mixture.sum(), torch.tensor(1.0))
    for other in (*torch.eye(3), torch.full((3,), 1 / 3)):
        assert mixed <= torch.einsum("m,mnc->nc", other, wrong).square().sum() + 1e-5
    taught = kdcl.teach(tuple(logits), labels)
    torch.testing.assert_close(taught, torch.einsum("m,mbc->bc", kdcl.mixture, logits))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_under_autocast(variant: str) -> None:
    kdcl = method(2, soft_target=variant).train()
    views, labels = torch.randn(2, 8, 3, 32, 32), torch.arange(8) % 4
    with torch.autocast("cpu", torch.bfloat16):
        parts = kdcl(views, labels)
        taught = kdcl.teach(tuple(z.bfloat16() for z in kdcl.cohort(views).logits), labels)
    assert taught.dtype == torch.float32 and not taught.requires_grad
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in kdcl.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixed_labels_are_probabilities(variant: str) -> None:
    kdcl, labels = method(2, soft_target=variant), torch.arange(8) % 4
    logits = tuple(torch.randn(2, 8, 4))
    hard, soft = kdcl.teach(logits, labels), kdcl.teach(logits, F.one_hot(labels, 4).float())
    torch.testing.assert_close(hard, soft)
