"""AFD against an independent float64 computation of the paper's formulas (tests/golden/afd_*)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.methods.afd import Afd, Critic, Transfer
from tests.helpers.networks import Tiny, Tokens
from tests.methods.golden import assert_same, load

IMAGES = torch.randn(4, 3, 32, 32)
NAMES = {"conv": "0", "bn": "1"}  # the golden files' words for the parts of a transfer layer


def golden_method(name: str) -> tuple[Afd, CohortOutput, dict[str, Tensor], dict]:
    """AFD with the critics and transfer layers of one golden file, and what its networks said, as leaves."""
    t, meta = load(name)
    count = meta["networks"]
    afd = Afd(Cohort(Tiny(), IMAGES, [Branch()] * (count - 1), taps=Afd.taps)).double().train()
    for k in range(count):
        afd.critics[k] = Critic(meta["C_star"], meta["D_mid"]).double()
        fill(afd.critics[k], t, f"D{k}_")
        if f"T{k}_conv_weight" in t:
            afd.transfers[k] = Transfer(meta["channels"][k], meta["C_star"]).double()
            fill(afd.transfers[k], t, f"T{k}_", NAMES)
    assert [type(x) is Transfer for x in afd.transfers] == [c != meta["C_star"] for c in meta["channels"]]
    logits, maps = ([t[f"{kind}{k}"].requires_grad_() for k in range(count)] for kind in "zf")
    return afd, CohortOutput(tuple(logits), tuple(maps)), t, meta


def fill(module: torch.nn.Module, t: dict[str, Tensor], prefix: str, names: dict[str, str] | None = None) -> None:
    own = module.state_dict()
    tensors = {key.removeprefix(prefix): value for key, value in t.items() if key.startswith(prefix)}
    for key, value in tensors.items():
        part, _, kind = key.partition("_")
        if part != "out":
            own[f"{(names or {}).get(part, part)}.{kind}"].copy_(value)


@pytest.mark.parametrize("name", ["afd_k2", "afd_k3"])
def test_every_loss(name: str) -> None:
    afd, out, t, meta = golden_method(name)
    parts, expected = afd.losses(out, t["labels"]), meta["components"]
    for k, member in enumerate(afd.cohort.names):
        assert_same(parts[f"ce/{member}"], expected[f"ce{k}"])
        assert_same(parts[f"kd/{member}"], expected[f"kl{k}_from{meta['teacher_of'][k]}"])
        assert_same(parts[f"ce/{member}"] + parts[f"kd/{member}"], expected[f"logit{k}"])
        assert_same(parts[f"critic/{member}"], expected[f"D{k}"])
        assert_same(parts[f"adversarial/{member}"], expected[f"G{k}"])
    for total, kinds in (("logit", ("ce", "kd")), ("D", ("critic",)), ("G", ("adversarial",))):
        assert_same(
            sum(v for k, v in parts.items() if k.startswith(tuple(f"{kind}/" for kind in kinds))),
            meta[f"total_{total}"],
        )


@pytest.mark.parametrize("name", ["afd_k2", "afd_k3"])
def test_one_backward_gives_the_gradients_of_three(name: str) -> None:
    afd, out, t, _ = golden_method(name)
    sum(afd.losses(out, t["labels"]).values()).backward()
    for k, (z, f) in enumerate(zip(out.logits, out.feature_maps, strict=True)):
        assert_same(z.grad, t[f"dz{k}"])
        assert_same(f.grad, t[f"d_LG_f{k}"])
        for key, parameter in afd.critics[k].named_parameters():
            assert_same(parameter.grad, t[f"d_LD_D{k}_{key.replace('.', '_')}"])
        for part, own in NAMES.items() if isinstance(afd.transfers[k], Transfer) else ():
            for kind in ("weight", "bias") if part == "bn" else ("weight",):
                assert_same(afd.transfers[k].get_parameter(f"{own}.{kind}").grad, t[f"d_LG_T{k}_{part}_{kind}"])


@pytest.mark.parametrize("name", ["afd_k2", "afd_k3"])
def test_critics_and_transfer_layers(name: str) -> None:
    afd, out, t, meta = golden_method(name)
    afd.eval()
    for k, x in enumerate(afd.common_maps(out)):
        assert_same(afd.critics[k](x), t[f"D{k}_out_fake_evalbn"])
    maps = afd.train().common_maps(out)
    for k, teacher in enumerate(meta["teacher_of"]):
        assert_same(maps[k], t[f"transferred{k}"])
        assert_same(afd.critics[k](maps[teacher]), t[f"D{k}_out_real"])
        assert_same(afd.critics[k](maps[k]), t[f"D{k}_out_fake"])
        assert_same(afd.critics[k].as_constant(maps[k]), t[f"D{k}_out_fake"])
        assert afd.critics[k].bn.num_batches_tracked == 2  # the constant call is not counted


def test_a_critic_starts_undecided_and_learns_at_its_own_rate() -> None:
    torch.manual_seed(0)
    afd = Afd(Cohort(Tiny(), IMAGES, [Branch()], taps=Afd.taps), critic_lr=0.25)
    assert ((afd.critics[0](torch.randn(8, 32, 8, 8)) - 0.5).abs() < 0.05).all()
    networks, critics = afd.param_groups(0.2)
    assert (networks["lr"], critics["lr"]) == (0.2, 0.05)
    assert {id(p) for p in critics["params"]} == {id(p) for p in afd.critics.parameters()}
    assert len(networks["params"]) + len(critics["params"]) == len(list(afd.parameters()))
    assert sum(p.numel() for p in Critic(64, 64).parameters()) == 37_057  # spec: 37.1 K


def test_networks_of_unequal_kind_in_a_ring() -> None:
    plan = Afd.plan(inspect(Tiny(), IMAGES), peers=[Tiny(width=5), Tokens()])
    afd = Afd(Cohort(Tiny(), IMAGES, plan, taps=Afd.taps))
    maps = afd.common_maps(afd.cohort(IMAGES))
    assert {x.shape for x in maps} == {(4, 32, 4, 4)}
    assert [type(x) is Transfer for x in afd.transfers] == [False, True, True]
    parts = afd(IMAGES, torch.arange(4))
    assert len(parts) == 12
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in afd.parameters())


def test_an_adversarial_loss_teaches_no_critic_and_a_critic_no_network() -> None:
    afd = Afd(Cohort(Tiny(), IMAGES, [Branch()], taps=Afd.taps))
    parts = afd(IMAGES, torch.arange(4))
    networks, critics = list(afd.cohort.parameters()), list(afd.critics.parameters())
    for kind, learners, others in (("adversarial", networks, critics), ("critic", critics, networks)):
        loss = sum(value for key, value in parts.items() if key.startswith(kind))
        grads = torch.autograd.grad(loss, [*learners, *others], retain_graph=True, allow_unused=True)
        assert any(g is not None for g in grads[: len(learners)])
        assert all(g is None for g in grads[len(learners) :])


def test_a_critic_whose_weights_are_held_at_norm_one() -> None:
    torch.manual_seed(0)
    afd = Afd(Cohort(Tiny(), IMAGES, [Branch()], taps=Afd.taps), spectral_norm=True)
    parts = afd(IMAGES, torch.arange(4))
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in afd.parameters()) and len(parts) == 8
    critic = afd.critics[0]
    for _ in range(30):  # each training call refines the estimate of the norm
        critic(torch.randn(4, 32, 4, 4))
    assert abs(torch.linalg.matrix_norm(critic.conv1.weight.flatten(1), 2) - 1) < 0.05
    before = {key: b.clone() for key, b in critic.named_buffers()}
    critic.as_constant(torch.randn(4, 32, 4, 4))
    assert all(torch.equal(b, before[key]) for key, b in critic.named_buffers())
