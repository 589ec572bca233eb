"""MCL against the numbers of the authors' own code (tests/golden/mcl_batch, mcl_memory), in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.errors import DataError
from okdc.methods.mcl import Mcl
from okdc.methods.shared.contrast import Bank, EmbeddingHead, contrast, mutual_contrast
from okdc.methods.shared.mixing import of_classes
from okdc.needs import Needs
from tests.helpers.networks import Tiny, Tokens
from tests.methods.golden import assert_same, load

IMAGES, LABELS = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
TRAIN_LABELS = torch.arange(40) % 4


def method(members: int = 2, **settings: object) -> Mcl:
    plan = Mcl.plan(inspect(Tiny(), IMAGES), members=members)
    return Mcl(Cohort(Tiny(), IMAGES, plan, taps=Mcl.taps), train_labels=TRAIN_LABELS, **settings)  # type: ignore[arg-type]


def with_golden_heads(mcl: Mcl, t: dict[str, Tensor], width: int) -> Mcl:
    mcl.heads = torch.nn.ModuleList(EmbeddingHead(t[f"features{m}"].shape[1], width) for m in range(2))
    for m, head in enumerate(mcl.heads):
        head.load_state_dict({key: t[f"head{m}.{key}"] for key in head.state_dict()})
    return mcl.double()


def settings_of(hyper: dict) -> dict[str, object]:
    names = {"vcl": "alpha_vcl", "soft_vcl": "gamma_soft_vcl", "icl": "beta_icl", "soft_icl": "lam_soft_icl"}
    return {key: hyper[name] for key, name in names.items()} | {"tau": hyper["tau"], "temperature": hyper["T"]}


def test_batch_losses_and_gradients() -> None:
    t, meta = load("mcl_batch")
    hyper, expected = meta["hyper"], meta["expected"]
    mcl = with_golden_heads(method(logit_kd=True, **settings_of(hyper)), t, hyper["feat_dim"])
    logits = t["logits"].requires_grad_()
    features = [t[f"features{m}"].requires_grad_() for m in range(2)]
    out = CohortOutput(tuple(logits), embeddings=tuple(features))
    for m, embedding in enumerate(mcl.embeddings(out)):
        assert_same(embedding, t[f"embeddings{m}"])
    parts = mcl.losses(out, t["labels"])
    for name, ce in zip(mcl.cohort.names, expected["ce_per_net"], strict=True):
        assert_same(parts[f"ce/{name}"], ce)
    for term, weight in mcl.weights.items():
        assert_same(parts[term] / weight, expected[term])
    assert_same(parts["kd/target"] + parts["kd/peer1"], expected["logit_kd"])
    total = sum(parts.values())
    assert_same(total, expected["loss"])
    total.backward()
    assert_same(logits.grad, t["grad_logits"], 2e-6)
    for m, head in enumerate(mcl.heads):
        assert_same(features[m].grad, t[f"grad_features{m}"], 2e-6)
        for key in ("fc1.weight", "fc2.bias"):
            assert_same(head.get_parameter(key).grad, t[f"grad_head{m}.{key}"], 2e-6)


def test_memory_losses_gradients_and_update() -> None:
    t, meta = load("mcl_memory")
    hyper, expected = meta["hyper"], meta["expected"]
    mcl = with_golden_heads(method(memory=True, **settings_of(hyper)), t, hyper["feat_dim"])
    bank = mcl.bank = Bank(
        torch.arange(36) % 6, 2, hyper["feat_dim"], hyper["neg_k"], hyper["memory_momentum"]
    ).double()
    bank.rows.copy_(torch.stack([t["memory0"], t["memory1"]]))
    features = [t[f"features{m}"].requires_grad_() for m in range(2)]
    embeddings = mcl.embeddings(CohortOutput((), embeddings=tuple(features)))
    rows = bank.gather(torch.cat([t["pos_index"], t["neg_index"]], 1))
    labels = torch.zeros(5, dtype=torch.long)
    parts = mcl.mutual_losses((torch.zeros(5, 3).double(),) * 2, embeddings, labels, rows)
    for term, weight in mcl.weights.items():
        assert_same(parts[term] / weight, expected[term])
    total = sum(parts[term] for term in mcl.weights)
    assert_same(total, expected["weighted_total"])
    total.backward()
    bank.update(t["pos_index"][:, 0], embeddings)
    for m in range(2):
        assert_same(features[m].grad, t[f"grad_features{m}"], 2e-6)
        assert_same(bank.rows[m], t[f"memory{m}_after"])


def test_three_networks_share_a_trunk_and_only_the_target_learns_from_the_mean() -> None:
    assert [b.cut for b in Mcl.plan(inspect(Tokens(), IMAGES), members=2)] == [None]
    assert method(members=2).cohort.cut is None
    mcl = method(members=4, logit_kd=True)
    assert mcl.cohort.cut is not None
    parts = mcl(IMAGES, LABELS)
    assert [key for key in parts if key.startswith("kd")] == ["kd/target"]
    embeddings = [e[None] for e in mcl.eval().embeddings(mcl.cohort(IMAGES))]
    terms = mutual_contrast(embeddings, LABELS, tau=0.1, temperature=3.0)
    alone = sum(mutual_contrast([e, e], LABELS, tau=0.1, temperature=3.0).vcl / 2 for e in embeddings)
    torch.testing.assert_close(terms.vcl / 3, alone)


def test_anchors_without_a_pair_are_left_out_and_a_batch_without_any_is_finite() -> None:
    logits = torch.randn(4, 4).double()
    others = ~torch.eye(4, dtype=torch.bool)
    labels = torch.tensor([0, 0, 1, 2])
    positives = others & (labels[:, None] == labels)
    everyone = contrast(logits, positives, others, torch.ones(4).double())
    rows = -logits[:2].masked_fill(~others[:2], -torch.inf).log_softmax(1)
    torch.testing.assert_close(everyone, (rows[0, 1] + rows[1, 0]) / 2)
    for size in (4, 1):
        mcl = method()
        images = IMAGES[:size]
        parts = mcl.eval()(images, torch.arange(size))
        assert parts["vcl"] == 0 and parts["icl"] == 0
        sum(parts.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in mcl.parameters())


def test_what_is_drawn_is_oneself_one_alike_and_others_of_all_other_classes() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 1, 1, 2, 0, 2, 3])
    bank = Bank(labels, 2, 4, 500, 0.5)
    indices = torch.arange(8)
    drawn = bank.draw(indices)
    assert drawn.shape == (8, 502) and torch.equal(drawn[:, 0], indices)
    assert torch.equal(labels[drawn[:, 1]], labels)
    for image in range(8):
        assert set(drawn[image, 2:].tolist()) == {i for i in range(8) if labels[i] != labels[image]}
    alike = torch.cat([bank.draw(indices)[:, 1:2] for _ in range(50)], 1)
    assert set(alike[0].tolist()) == {0, 4, 6} and set(alike[7].tolist()) == {7}


def test_needs_follow_the_form_and_a_bank_needs_labels() -> None:
    assert Mcl.needs() == Needs(pairs=True, mixed=True)
    assert Mcl.needs(memory=True, tau=0.07) == Needs(indices=True, mixed=True)
    cohort = Cohort(Tiny(), IMAGES, [Branch()], taps=Mcl.taps)
    with pytest.raises(DataError, match=r"got none.*memory=false"):
        Mcl(cohort, memory=True)
    with pytest.raises(DataError, match="one class alone"):
        Mcl(cohort, memory=True, train_labels=torch.zeros(8, dtype=torch.long))


def test_the_bank_learns_in_training_alone_and_resumes_exactly() -> None:
    torch.manual_seed(0)
    mcl = method(memory=True, negatives=16)
    twin = method(memory=True, negatives=16)
    indices = torch.arange(8)
    before = mcl.bank.rows.clone()
    mcl.eval()(IMAGES, LABELS, indices)
    assert torch.equal(mcl.bank.rows, before)
    mcl.train()(IMAGES, LABELS, indices)
    assert not torch.equal(mcl.bank.rows[:, :8], before[:, :8]) and torch.equal(mcl.bank.rows[:, 8:], before[:, 8:])
    torch.testing.assert_close(mcl.bank.rows[:, :8].norm(dim=2), torch.ones(2, 8))
    twin.load_state_dict(copy.deepcopy(mcl.state_dict()))
    for m in (mcl, twin):
        torch.manual_seed(5)
        m(IMAGES, LABELS, indices)
    assert torch.equal(mcl.bank.rows, twin.bank.rows)


def mixture() -> tuple[Tensor, Tensor, Tensor]:
    """Indices (8, 2), shares (8,) and soft labels, as timm mixes an image with the one as far from the other end."""
    indices = torch.stack([torch.arange(8), torch.arange(8).flip(0)], 1)
    shares = torch.full((8,), 0.7, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(TRAIN_LABELS[indices], 4).double()
    return indices, shares, 0.7 * one_hot[:, 0] + 0.3 * one_hot[:, 1]


def of_one_anchor(vector: Tensor, candidates: Tensor, positives: list[tuple[int, float]], tau: float) -> float:
    """-log softmax of the candidates, its mean over positives (which, and how much each counts)."""
    scores = [float(vector @ candidate) / tau for candidate in candidates]
    whole = math.log(sum(math.exp(score) for score in scores))
    return sum(counts * (whole - scores[i]) for i, counts in positives) / sum(counts for _, counts in positives)


def test_mixed_images_of_a_batch_are_alike_by_their_shares() -> None:
    torch.manual_seed(0)
    mcl = method(vcl=1.0, soft_vcl=0.0, icl=1.0, soft_icl=0.0, tau=0.5).double()
    a, b = (torch.nn.functional.normalize(torch.randn(8, 6).double()) for _ in range(2))
    (indices, shares, labels), logits = mixture(), (torch.randn(8, 4).double(),) * 2
    parts = mcl.mutual_losses(logits, [a, b], labels, None, of_classes(mcl.train_labels, indices, shares))
    expected = {"vcl": 0.0, "icl": 0.0}
    for name, pairs in {"vcl": [(a, a), (b, b)], "icl": [(a, b), (b, a)]}.items():
        for mine, theirs in pairs:
            for anchor in range(8):
                others = [i for i in range(8) if i != anchor]
                for share, kind in zip((0.7, 0.3), TRAIN_LABELS[indices[anchor]].tolist(), strict=True):
                    has = [(n, float(labels[i, kind])) for n, i in enumerate(others)]  # how much it is of this class
                    expected[name] += share * of_one_anchor(mine[anchor], theirs[others], has, 0.5) / 8
    assert {name: parts[name].item() for name in expected} == pytest.approx(expected, rel=1e-9)


def test_mixed_images_are_held_against_the_bank_for_the_sake_of_both() -> None:
    torch.manual_seed(0)
    mcl = method(memory=True, negatives=5, vcl=1.0, soft_vcl=0.0, icl=1.0, soft_icl=0.0, tau=0.5).double()
    a, b = (torch.nn.functional.normalize(torch.randn(8, 128).double()) for _ in range(2))
    (indices, shares, labels), logits = mixture(), (torch.randn(8, 4).double(),) * 2
    drawn = mcl.bank.draw_each(indices)
    assert torch.equal(torch.stack([each[:, 0] for each in drawn], 1), indices)
    parts = mcl.mutual_losses(logits, [a, b], labels, *mcl.bank.held(drawn, shares))
    expected = {"vcl": 0.0, "icl": 0.0}
    for share, images in zip((0.7, 0.3), drawn, strict=True):
        for anchor in range(8):
            rows = mcl.bank.rows[:, images[anchor]]
            for m, mine in enumerate((a, b)):
                own, other = rows[m][1:], rows[1 - m]  # its own network's row of the image itself is no candidate
                expected["vcl"] += share * of_one_anchor(mine[anchor], own, [(0, 1.0)], 0.5) / 8
                expected["icl"] += share * of_one_anchor(mine[anchor], other, [(0, 1.0), (1, 1.0)], 0.5) / 8
    assert {name: parts[name].item() for name in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("memory", [False, True])
def test_images_that_are_mixed_with_nothing_have_the_losses_of_images(memory: bool) -> None:
    torch.manual_seed(0)
    mcl = method(memory=memory, negatives=16).double()
    twin = copy.deepcopy(mcl)
    images, (indices, shares, _) = IMAGES.double(), mixture()
    torch.manual_seed(1)
    plain = mcl(images, LABELS, *([indices[:, 0]] if memory else []))
    torch.manual_seed(1)
    mixed = twin(images, LABELS, indices, torch.ones_like(shares))
    assert plain.keys() == mixed.keys()
    for name, value in plain.items():
        assert mixed[name].item() == pytest.approx(value.item(), rel=1e-14), name
    if memory:
        assert torch.equal(mcl.bank.rows, twin.bank.rows)


def test_what_enters_the_bank_of_a_mixed_image() -> None:
    torch.manual_seed(0)
    bank = Bank(TRAIN_LABELS, 1, 6, 5, 0.5).double()
    before, new = bank.rows[0].clone(), torch.nn.functional.normalize(torch.randn(3, 6).double())
    indices, shares = torch.tensor([[0, 9], [1, 8], [2, 7]]), torch.tensor([0.9, 0.2, 0.5])
    bank.update(indices, [new], shares)
    moved = {0: 0.4 * new[0] + 0.6 * before[0], 8: 0.3 * new[1] + 0.7 * before[8], 2: before[2]}  # (1 - 0.5) (2 s - 1)
    for image, row in moved.items():
        torch.testing.assert_close(bank.rows[0, image], row / row.norm(), rtol=1e-6, atol=1e-6)
    untouched = [i for i in range(40) if i not in moved]
    assert torch.equal(bank.rows[0, untouched], before[untouched])


def test_a_bank_of_half_precision_takes_half_the_memory_and_says_nearly_the_same() -> None:
    torch.manual_seed(0)
    half, full = (method(memory=True, negatives=16, bank_dtype=dtype) for dtype in ("float16", "float32"))
    full.load_state_dict(copy.deepcopy(half.state_dict()))  # rows too, which any float32 can hold
    assert full.bank.rows.dtype == torch.float32 and 2 * half.bank.rows.nbytes == full.bank.rows.nbytes
    parts = []
    for mcl in (half, full):
        torch.manual_seed(5)
        first = mcl(IMAGES, LABELS, torch.arange(8))
        again = mcl(IMAGES, LABELS, torch.arange(8))
        parts.append({name: x.detach() for name, x in [*first.items(), *((f"then {n}", x) for n, x in again.items())]})
    assert half.bank.rows.dtype == torch.float16 and all(x.dtype == torch.float32 for x in parts[0].values())
    torch.testing.assert_close(half.bank.rows.float(), full.bank.rows, rtol=0, atol=3e-4)  # two roundings
    names = ("vcl", "icl", "soft_vcl", "soft_icl")
    assert all(parts[0][name] == parts[1][name] for name in names)  # of the same rows
    assert all(parts[0][f"then {name}"] == pytest.approx(float(parts[1][f"then {name}"]), rel=1e-3) for name in names)


def test_networks_of_another_architecture() -> None:
    plan = Mcl.plan(inspect(Tiny(), IMAGES), peers=[Tokens()])
    mcl = Mcl(Cohort(Tiny(), IMAGES, plan, taps=Mcl.taps))
    parts = mcl(IMAGES, LABELS)
    assert set(parts) == {"ce/target", "ce/peer1", "vcl", "soft_vcl", "icl", "soft_icl"}
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in mcl.parameters())
