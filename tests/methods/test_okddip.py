"""OKDDip against the numbers of the authors' own code (tests/golden/okddip_*), in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.errors import RecipeError
from okdc.losses import rampup
from okdc.methods.okddip import Attention, Okddip
from tests.helpers.networks import Tiny, Tokens
from tests.methods.golden import assert_same, load

IMAGES = torch.randn(4, 3, 32, 32)


def method(**settings: object) -> Okddip:
    return Okddip(Cohort(Tiny(), IMAGES, [Branch("early")] * 3, taps=Okddip.taps), **settings).double()


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("mode", ["nodetach", "detach"])
def test_losses_and_gradients(row: int, mode: str) -> None:
    t, meta = load("okddip_losses")
    leaves = {k: t[k].requires_grad_() for k in ("leader_logits", "peer_logits", "peer_targets")}
    peers, targets = (leaves[k].transpose(1, 2) for k in ("peer_logits", "peer_targets"))
    teaching = peers.detach() if mode == "detach" else peers
    okddip = method(rampup_epochs=80)
    okddip.epoch.fill_(meta["hyper"]["epochs"][row])
    parts = okddip.two_level_losses(
        leaves["leader_logits"], peers, targets.detach() if mode == "detach" else targets, teaching.mean(1), t["labels"]
    )
    weight, expected = t["ramp.weight"][row], meta["expected"]
    assert_same(okddip.epoch, t["ramp.epoch"][row])
    assert_same(parts["ce/target"], t["expected.ce.leader"])
    assert_same(parts["kd/target"], weight * t["expected.kd.leader"])
    for i in range(3):
        assert_same(parts[f"ce/branch{i + 1}"], t["expected.ce.peer"][i])
        assert_same(parts[f"kd/branch{i + 1}"], weight * t["expected.kd.peer"][i])
    peer_parts = {kind: sum(parts[f"{kind}/branch{i + 1}"] for i in range(3)) for kind in ("ce", "kd")}
    assert_same(peer_parts["ce"], expected[f"r{row}.ce_peers"])
    assert_same(peer_parts["kd"], weight * expected[f"r{row}.kd_peers_unweighted"])
    total = sum(parts.values())
    assert_same(total, t[f"expected.loss.r{row}.total"])
    assert_same(total, expected[f"r{row}.total"])
    total.backward()
    for key, leaf in leaves.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert_same(grad, t[f"expected.grad.r{row}.{mode}.{key}"])


@pytest.mark.parametrize("row", [0, 1])
def test_exact_divergence(row: int) -> None:
    t, meta = load("okddip_losses")
    peers, targets = t["peer_logits"].transpose(1, 2), t["peer_targets"].transpose(1, 2)
    okddip = method(rampup_epochs=80, eps=0.0)
    okddip.epoch.fill_(meta["hyper"]["epochs"][row])
    parts = okddip.two_level_losses(t["leader_logits"], peers, targets, peers.mean(1), t["labels"])
    assert_same(sum(parts.values()), t[f"expected.loss.r{row}.eps0.total"])
    assert_same(sum(parts.values()), meta["expected"][f"r{row}.eps0.total"])


def test_cross_entropy_in_place_of_the_divergence() -> None:
    t, _ = load("okddip_losses")
    peers, targets = t["peer_logits"].transpose(1, 2), t["peer_targets"].transpose(1, 2)
    both = [method(loss=loss, eps=0.0, rampup_epochs=0) for loss in ("kl", "ce")]
    leader, student = t["leader_logits"], peers.clone().requires_grad_()
    kld, ce = (m.two_level_losses(leader, student, targets, peers.mean(1), t["labels"]) for m in both)
    p = torch.softmax(targets[:, 0] / 3, 1)
    assert_same(ce["kd/branch1"] - kld["kd/branch1"], -9 * (p * p.log()).sum(1).mean())
    grads = [torch.autograd.grad(parts["kd/branch1"], student, retain_graph=True)[0] for parts in (kld, ce)]
    assert_same(*grads)  # the entropy of a target that does not learn has no gradient


def golden_graph(t: dict[str, Tensor], **settings: object) -> tuple[Okddip, CohortOutput, list[Tensor], list[Tensor]]:
    """The method and the four members of okddip_attention; embeddings and logits in the golden order (leader last)."""
    okddip = method(rampup_epochs=80, **settings)
    okddip.epoch.fill_(40)
    okddip.attention = Attention(64, 8).double()
    okddip.attention.query.weight.data = t["attn.query.weight"].clone()
    okddip.attention.key.weight.data = t["attn.key.weight"].clone()
    pooled = [t[f"pooled.{i}"].clone().requires_grad_() for i in range(4)]
    logits = [pooled[i] @ t[f"classifier.{i}.weight"].T + t[f"classifier.{i}.bias"] for i in range(4)]
    for z in logits:
        z.retain_grad()
    leader_first = [3, 0, 1, 2]
    out = CohortOutput(tuple(logits[i] for i in leader_first), embeddings=tuple(pooled[i] for i in leader_first))
    return okddip, out, pooled, logits


def test_attention_end_to_end() -> None:
    t, meta = load("okddip_attention")
    okddip, out, pooled, logits = golden_graph(t)
    peers, embeddings = torch.stack(out.logits[1:], 1), torch.stack(out.embeddings[1:], 1)
    assert_same(okddip.attention(embeddings), t["expected.attention"])
    assert_same(okddip.mixtures(peers, embeddings), t["expected.peer_targets"].transpose(1, 2))
    assert_same(peers, t["expected.peer_logits"].transpose(1, 2))
    assert_same(okddip.ensemble(out), t["expected.peer_logits"].mean(2))
    assert_same(out.logits[0], t["expected.leader_logits"])
    assert_same(rampup(okddip.epoch, 80), meta["expected"]["ramp_weight"])
    total = sum(okddip.losses(out, t["labels"]).values())
    assert_same(total, meta["expected"]["total"])
    total.backward()
    assert_same(okddip.attention.query.weight.grad, t["expected.grad.nodetach.attn.query.weight"])
    assert_same(okddip.attention.key.weight.grad, t["expected.grad.nodetach.attn.key.weight"])
    for i in range(4):
        assert_same(pooled[i].grad, t[f"expected.grad.nodetach.pooled.{i}"])
    for i in range(3):
        assert_same(logits[i].grad, t["expected.grad.nodetach.peer_logits"][:, :, i])
    assert_same(logits[3].grad, t["expected.grad.nodetach.leader_logits"])


def test_constant_targets_starve_the_attention_and_constant_logits_do_not() -> None:
    t, _ = load("okddip_attention")
    okddip, out, pooled, logits = golden_graph(t)
    peers = torch.stack(out.logits[1:], 1)
    targets = okddip.mixtures(peers, torch.stack(out.embeddings[1:], 1)).detach()
    parts = okddip.two_level_losses(out.logits[0], peers, targets, peers.mean(1).detach(), t["labels"])
    sum(parts.values()).backward()
    assert okddip.attention.query.weight.grad is None
    for i in range(4):
        assert_same(pooled[i].grad, t[f"expected.grad.detach.pooled.{i}"])
    okddip, out, _, again = golden_graph(t, detach="logits")
    sum(okddip.losses(out, t["labels"]).values()).backward()
    assert_same(okddip.attention.query.weight.grad, t["expected.grad.nodetach.attn.query.weight"])
    assert_same(okddip.attention.key.weight.grad, t["expected.grad.nodetach.attn.key.weight"])
    for mine, starved in zip(again, logits, strict=True):
        assert_same(mine.grad, starved.grad)


def test_rampup() -> None:
    t, meta = load("okddip_rampup")
    assert_same(torch.stack([rampup(e, meta["hyper"]["rampup"]) for e in t["epoch"]]), t["weight"])
    attention, _ = load("okddip_attention")
    share, out, _, _ = golden_graph(attention)
    share.rampup_epochs = None
    share.epoch.fill_(4), share.epochs.fill_(30)
    fixed, _, _, _ = golden_graph(attention)
    torch.testing.assert_close(share.losses(out, attention["labels"]), fixed.losses(out, attention["labels"]))


def test_mixed_probabilities() -> None:
    torch.manual_seed(0)
    okddip = method(mix="prob")
    peers, embeddings = torch.randn(5, 3, 7).double() * 4, torch.randn(5, 3, 32).double()
    naive = torch.zeros(5, 3, 7).double()
    attention = okddip.attention(embeddings)
    for a in range(3):
        for b in range(3):
            naive[:, a] += attention[:, a, b, None] * torch.softmax(peers[:, b] / 3.0, 1)
    torch.testing.assert_close(torch.softmax(okddip.mixtures(peers, embeddings) / 3.0, 2), naive)


def test_the_leader_is_the_target_and_may_be_of_another_width() -> None:
    plan = Okddip.plan(inspect(Tiny(), IMAGES), peers=[Tokens(), Tokens()])
    okddip = Okddip(Cohort(Tiny(), IMAGES, plan, taps=Okddip.taps))
    assert okddip.attention.query.weight.shape == (2, 16)
    sum(okddip(IMAGES, torch.arange(4)).values()).backward()
    assert all(p.grad is not None for p in okddip.parameters())


@pytest.mark.parametrize(
    ("branches", "said"),
    [
        ([Branch("early")], "given 2 members; expected 3"),
        ([Branch(network=Tiny(width=5)), Branch(network=Tokens())], r"unequal widths \[20, 16\]"),
    ],
)
def test_what_it_cannot_teach(branches: list[Branch], said: str) -> None:
    cohort = Cohort(Tiny(), IMAGES, branches, taps=Okddip.taps)
    with pytest.raises(RecipeError, match=said):
        Okddip(cohort)
