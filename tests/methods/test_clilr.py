"""CL and CL-ILR against an independent implementation and OKDDip's own code (tests/golden), in float64."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.losses import kl, rampup
from okdc.methods.clilr import Clilr
from tests.helpers.networks import Tiny, Tokens
from tests.methods.golden import assert_same, load

How = Literal["sum", "mean"]


class Flat(nn.Module):
    """A trunk, a 1x1 convolution (or nothing), the mean over the pixels and a linear classifier."""

    def __init__(self, trunk: nn.Module, tail: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.tail, self.head = trunk, tail, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.trunk(x)).mean((2, 3)))


def method(members: int = 4, **settings: object) -> Clilr:
    branches = [Branch("early") for _ in range(members - 1)]
    return Clilr(Cohort(Tiny(), torch.randn(2, 3, 32, 32), branches), **settings).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["paper", "paper_t2", "half_kl", "ramped_kl"])
def test_every_variant(variant: str) -> None:
    t, meta = load("cl_ilr")
    expected = meta["variants"][variant]
    clilr = method(variant=variant, rampup_epochs=80)
    assert clilr.temperature == expected["T"] and clilr.beta == expected.get("beta", 0.5)
    hard, soft = clilr.beta, 1 - clilr.beta
    if variant == "ramped_kl":  # an epoch whose weight is the golden one
        soft = expected["ramp_weight"]
        clilr.epoch.fill_(80 * (1 - (-torch.log(torch.tensor(soft).double()) / 5).sqrt()))
        hard = 1.0
    logits = [t[f"z{h}"].requires_grad_() for h in range(4)]
    parts = clilr.losses(CohortOutput(tuple(logits)), t["labels"])
    for h, name in enumerate(clilr.cohort.names):
        assert_same(torch.stack([z for j, z in enumerate(logits) if j != h]).mean(0), t[f"target_logits{h}"])
        assert_same(parts[f"ce/{name}"], hard * expected["hard"][h])
        assert_same(parts[f"soft/{name}"], soft * expected["soft"][h])
    assert_same(sum(parts.values()), expected["total"])
    sum(parts.values()).backward()
    for h, leaf in enumerate(logits):
        assert_same(leaf.grad, t[f"dz{h}_{variant}"])


@pytest.mark.parametrize(("how", "key"), [("mean", "rescaled"), ("sum", "plain")])
def test_rescaled_gradients_of_a_cohort(how: How, key: str) -> None:
    t, meta = load("cl_ilr")
    images = t["ilr_x"].reshape(6, 5, 1, 1).expand(6, 5, 2, 2)  # equal pixels, whose mean is one of them
    trunk = nn.Sequential(nn.Conv2d(5, 5, 1, bias=False), nn.Tanh())
    cohort = Cohort(
        Flat(trunk, nn.Identity(), nn.Linear(5, 10, bias=False)).double(), images, [Branch("trunk")] * 3,
        trunk_gradient=how,
    )  # fmt: skip
    trunk[0].weight.data = t["ilr_shared_weight"].reshape(5, 5, 1, 1)
    for h, member in enumerate(cohort.members):
        member.head.weight.data = t[f"ilr_head{h}_weight"]
    clilr = Clilr(cohort, variant="paper")
    parts = clilr(images, t["labels"])
    assert_same(sum(parts.values()), meta["ilr"]["total" if how == "mean" else "total_plain"])
    sum(parts.values()).backward()
    assert_same(trunk[0].weight.grad.reshape(5, 5), t[f"ilr_d_shared_weight_{key}"])
    for h, member in enumerate(cohort.members):
        assert_same(member.head.weight.grad, t[f"ilr_d_head{h}_weight_{key}"])


@pytest.mark.parametrize(("how", "key"), [("mean", "ilr"), ("sum", "noscale")])
def test_okddips_own_code(how: How, key: str) -> None:
    t, meta = load("okddip_clilr")
    images = t["shared_feature"].requires_grad_()
    target = Flat(nn.Identity(), nn.Conv2d(32, 64, 1, bias=False), nn.Linear(64, 10)).double()
    cohort = Cohort(target, images.detach(), [Branch("trunk")] * 3, trunk_gradient=how)
    for i, member in enumerate(cohort.members):
        member.tail.weight.data = t[f"branch.{i}.conv1x1.weight"]
        member.head.weight.data, member.head.bias.data = t[f"classifier.{i}.weight"], t[f"classifier.{i}.bias"]
    clilr = Clilr(cohort, variant="ramped_kl", detach_teacher=False, rampup_epochs=80)
    clilr.epoch.fill_(meta["hyper"]["epoch"])
    out, expected = cohort(images), meta["expected"]
    for z in out.logits:
        z.retain_grad()
    assert_same(torch.stack(out.logits, 2), t["expected.logits"])
    targets = torch.stack([sum(z for j, z in enumerate(out.logits) if j != i) / 3 for i in range(4)], 2)
    assert_same(targets, t["expected.targets"])
    parts, ramp = clilr.losses(out, t["labels"]), rampup(clilr.epoch, 80).double()
    assert_same(sum(v for k, v in parts.items() if k.startswith("ce/")), expected["ce"])
    unweighted = sum(kl(z, targets[:, :, i], 3.0, eps=1e-7) for i, z in enumerate(out.logits))
    assert_same(unweighted, expected["kd_unweighted"])
    assert_same(ramp, expected["ramp_weight"])
    assert_same(sum(parts.values()), expected["total"])
    sum(parts.values()).backward()
    assert_same(torch.stack([z.grad for z in out.logits], 2), t["expected.grad.logits"])
    assert_same(images.grad, t[f"expected.grad.{key}.shared_feature"])
    assert_same(target.tail.weight.grad, t[f"expected.grad.{key}.branch.0.conv1x1.weight"])


class Levels(nn.Module):
    """Two 1x1 convolutions with tanh, the mean over the pixels and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.root, self.middle = (nn.Sequential(nn.Conv2d(5, 5, 1, bias=False), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(5, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.root(x)).mean((2, 3)))


def test_a_tree_of_two_splits() -> None:
    t, meta = load("cl_ilr")
    images = t["ilr_x"].reshape(6, 5, 1, 1).expand(6, 5, 2, 2)
    plan = Clilr.plan(inspect(Levels().double(), images), cut="middle,root")
    assert [(b.cut, b.parent) for b in plan] == [("middle", 0), ("root", 0), ("middle", 2)]
    cohort = Cohort(Levels().double(), images, plan, trunk_gradient="mean")
    assert cohort.costs[1].flops == cohort.costs[3].flops < cohort.costs[2].flops < cohort.costs[0].flops
    weights = {f"head{h}": member.head.weight for h, member in enumerate(cohort.members)}
    weights |= {"A": cohort.target.root[0].weight, "B0": cohort.target.middle[0].weight}
    weights["B1"] = cohort.branches[1].middle[0].weight
    for name, weight in weights.items():
        weight.data = t[f"tree_{name}"].reshape(weight.shape).clone()
    assert sum(p.numel() for p in cohort.parameters()) == sum(w.numel() for w in weights.values())
    for again in (cohort, copy.deepcopy(cohort)):
        parts = Clilr(again, variant="paper")(images, t["labels"])
        assert_same(sum(parts.values()), meta["tree"]["total"])
    sum(Clilr(cohort, variant="paper")(images, t["labels"]).values()).backward()
    for name, weight in weights.items():
        assert_same(weight.grad.reshape(t[f"tree_d_{name}"].shape), t[f"tree_d_{name}"])


@pytest.mark.parametrize("network", [Tiny, Tokens])
def test_a_tree_shares_what_it_should(network: type[nn.Module]) -> None:
    images, cuts = torch.randn(4, 3, 32, 32), {Tiny: "stem,early", Tokens: "blocks.1,blocks.3"}[network]
    target = network()
    cohort = Cohort(target, images, Clilr.plan(inspect(target, images), cut=cuts), trunk_gradient="mean").eval()
    own, other = target.state_dict(), cohort.branches[1].state_dict()
    cohort.branches[0].load_state_dict({k: own[k] for k in cohort.branches[0].state_dict()})
    cohort.branches[2].load_state_dict({k: other[k] for k in cohort.branches[2].state_dict()})
    z = cohort(images).logits
    assert torch.equal(z[0], z[1]) and torch.equal(z[2], z[3]) and not torch.allclose(z[0], z[2])
    inside = z[0]
    assert cohort.strip() is target and torch.equal(target(images), inside)
