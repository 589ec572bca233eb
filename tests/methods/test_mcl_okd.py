"""MCL-OKD against the numbers of the authors' own code (tests/golden/mcl_okd_*), in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.losses import memory_scores, nce
from okdc.methods.mcl_okd import MclOkd
from okdc.networks import load as load_network
from okdc.recipe import NetworkSettings
from tests.helpers.networks import Tiny, Tokens
from tests.methods.golden import assert_same, load

LABELS = torch.tensor([0, 1, 2, 3, 1, 2, 3, 3, 2, 3] * 4)  # classes of 4, 8, 12 and 16 images
ORDER = [2, 0, 1]  # members 0, 1, 2 are the authors' peers 2, 0, 1: their student is the last, okdc's is the target


def method(members: int = 3, labels: Tensor = LABELS, **settings: object) -> MclOkd:
    images = torch.randn(2, 3, 32, 32)
    cohort = Cohort(Tiny(), images, [Branch("early") for _ in range(members - 1)], taps=MclOkd.taps)
    return MclOkd(cohort, train_labels=labels, **{"negatives": 16, **settings})


def golden_method(t: dict[str, Tensor], hyper: dict) -> MclOkd:
    settings = {"negatives": hyper["K"], "tau": hyper["tau"], "momentum": hyper["memory_momentum"]}
    made = method(hyper["M"], width=hyper["feat_dim"], **settings).double()
    made.heads = nn.ModuleList(nn.Linear(t["features"].shape[2], hyper["feat_dim"]) for _ in ORDER).double()
    for head, peer in zip(made.heads, ORDER):
        head.load_state_dict({"weight": t[f"embed{peer}.weight"], "bias": t[f"embed{peer}.bias"]})
    made.bank.rows.copy_(torch.stack([t[f"memory{peer}"] for peer in ORDER]))
    return made


def embed(made: MclOkd, features: Tensor) -> list[Tensor]:
    peers = tuple(features[peer] for peer in ORDER)
    return made.embed(CohortOutput(logits=peers, embeddings=peers))


def check_gradients(made: MclOkd, t: dict[str, Tensor], features: Tensor) -> None:
    assert_same(features.grad, t["grad_features"])
    for head, peer in zip(made.heads, ORDER):
        assert_same(head.weight.grad, t[f"grad_embed{peer}.weight"])
        if f"grad_embed{peer}.bias" in t:
            assert_same(head.bias.grad, t[f"grad_embed{peer}.bias"])


def test_contrast_and_memory() -> None:
    t, meta = load("mcl_okd_nce")
    hyper, expected = meta["hyper"], meta["expected"]
    made, features = golden_method(t, hyper), t["features"].requires_grad_()
    embeddings = embed(made, features)
    for embedding, peer in zip(embeddings, ORDER):
        assert_same(embedding, t["embeddings"][peer])
    total = torch.zeros((), dtype=torch.float64)
    for n, pair in enumerate(expected["pairs"]):
        bank = made.bank.rows[ORDER.index(pair["memory_of"])]
        scores = memory_scores(
            bank[t["contrast_index"]], embeddings[ORDER.index(pair["embedding_of"])], hyper["tau"]
        )  # fmt: skip
        if n == 0:
            assert_same(scores.exp() / hyper["n_data"], t["scores_pair0"])
        loss = nce(scores, hyper["n_data"], eps=hyper["eps"])
        assert_same(loss, pair["loss"])
        total = total + loss
    assert len(expected["pairs"]) == 6
    assert_same(total, expected["nce_total"])
    total.backward()
    check_gradients(made, t, features)
    made.bank.update(t["sample_index"], embeddings)
    for bank, peer in zip(made.bank.rows, ORDER):
        assert_same(bank, t[f"memory{peer}_after"])


def test_whole_loss() -> None:
    t, meta = load("mcl_okd_total")
    hyper, expected = meta["hyper"], meta["expected"]
    made = golden_method(t, hyper)
    assert (made.temperature, made.gamma, made.alpha, made.beta) == tuple(
        hyper[key] for key in ("kd_T", "gamma_ce", "alpha_kl", "beta_nce")
    )
    features, logits = t["features"].requires_grad_(), t["logits"].requires_grad_()
    parts = made.contrastive_losses(
        [logits[peer] for peer in ORDER], embed(made, features), t["labels"], t["contrast_index"]
    )
    for name, peer in zip(made.cohort.names, ORDER, strict=True):
        assert_same(parts[f"ce/{name}"], expected["ce_per_branch"][peer])
    assert_same(parts["kd/target"], expected["kl_last_from_mean"])
    nces = [value for key, value in parts.items() if key.startswith("nce/")]
    assert_same(sum(nces) / made.beta, expected["nce"])
    assert len(parts) == 3 + 1 + 3
    assert_same(sum(parts.values()), expected["loss"])
    sum(parts.values()).backward()
    assert_same(logits.grad, t["grad_logits"])
    check_gradients(made, t, features)


@pytest.mark.parametrize(("settings", "distinct"), [({}, True), ({"replacement": True}, False), ({"negatives": 30}, 0)])
def test_negatives_are_drawn_evenly_from_the_other_classes(settings: dict, distinct: bool) -> None:
    made, indices = method(2, **settings), torch.arange(len(LABELS)).repeat(100)
    torch.manual_seed(0)
    rows = made.draw(indices)
    positives, negatives = rows[:, 0], rows[:, 1:]
    assert torch.equal(positives, indices) and negatives.shape[1] == made.bank.negatives
    assert (LABELS[negatives] != LABELS[indices, None]).all()
    assert all(len(row.unique()) == made.bank.negatives for row in negatives) == distinct
    drawn = negatives[LABELS[indices] == 1].flatten().bincount(minlength=len(LABELS)).float()
    mean = drawn.sum() / (LABELS != 1).sum()
    assert (drawn[LABELS != 1] - mean).abs().max() < 5 * mean.sqrt()
    assert not torch.equal(made.draw(indices), rows)
    torch.manual_seed(0)
    assert torch.equal(made.draw(indices), rows)  # a step that is done again draws the same


@pytest.mark.parametrize("negatives", [60, 130])  # of 240 others or more: fewer than half of them, and more
def test_no_image_is_drawn_twice_for_another(negatives: int) -> None:
    labels = LABELS.repeat(10)
    bank, indices = method(2, labels, negatives=negatives).bank, torch.arange(400).repeat(10)
    torch.manual_seed(0)
    rows = bank.draw(indices)[:, 2:]
    assert all(len(row.unique()) == negatives for row in rows) and (labels[rows] != labels[indices, None]).all()
    drawn = rows[labels[indices] == 1].flatten().bincount(minlength=400).float()[labels != 1]
    assert (drawn - drawn.mean()).abs().max() < 5 * drawn.mean().sqrt()


def test_a_step_does_not_draw_a_number_for_each_image() -> None:
    bank = method(2, torch.arange(1_000_000) % 1000, negatives=256, width=1).bank
    assert not bank.replacement and 256 < bank.draws < 300
    assert len(bank.draw(torch.tensor([5]))[0].unique()) == 258


def test_a_relaxed_positive_is_any_image_of_the_class() -> None:
    made = method(2, positive="relax")
    for image in range(10):
        positives = made.draw(torch.full((400,), image))[:, 0]
        assert torch.equal(positives.unique(), (LABELS[image] == LABELS).nonzero()[:, 0])


def test_mixed_images_are_held_against_the_banks_for_the_sake_of_both() -> None:
    torch.manual_seed(0)
    made = method().double()
    z = [torch.randn(6, 4).double() for _ in range(3)]
    v = [nn.functional.normalize(torch.randn(6, 128).double()) for _ in range(3)]
    indices, shares = torch.stack([torch.arange(6), torch.arange(6).flip(0)], 1), torch.full((6,), 0.7).double()
    rows = [made.drawn(each) for each in made.bank.draw_each(indices)]
    assert torch.equal(rows[1][:, 0], indices[:, 1])
    first, second, mixed, alone = (
        made.contrastive_losses(z, v, LABELS[:6], *more)
        for more in (rows[:1], rows[1:], (*rows, shares), (*rows, torch.ones(6)))
    )
    for name in first:
        if name.startswith("nce/"):  # linear in the shares, which are the same for all images of a batch
            torch.testing.assert_close(mixed[name], shares[0] * first[name] + (1 - shares[0]) * second[name])
            assert not torch.allclose(first[name], second[name])
        assert torch.equal(alone[name], first[name])
    unlike = made.contrastive_losses(z, v, LABELS[:6], *rows, torch.tensor([1.0, 1, 1, 0, 0, 0]))
    told = [memory_scores(made.bank.rows[m][each], v[0], made.tau) for m in (1, 2) for each in rows]
    by_hand = sum(
        nce(told[i][part], 40) / 2 for i, part in ((0, [0, 1, 2]), (1, [3, 4, 5]), (2, [0, 1, 2]), (3, [3, 4, 5]))
    )
    torch.testing.assert_close(unlike["nce/target"], made.beta * by_hand)


def test_only_the_target_learns_from_the_mean_unless_all_shall() -> None:
    images, labels, indices = torch.randn(8, 3, 32, 32), LABELS[:8], torch.arange(8)
    keys = [key for key in method()(images, labels, indices) if key.startswith("kd/")]
    assert keys == ["kd/target"]
    keys = [key for key in method(distill_all=True)(images, labels, indices) if key.startswith("kd/")]
    assert keys == ["kd/target", "kd/branch1", "kd/branch2"]


def test_contrast_teaches_the_embedding_and_not_the_memory_it_is_held_against() -> None:
    made, images, indices = method(2), torch.randn(8, 3, 32, 32), torch.arange(8)
    made(images, LABELS[:8], indices)["nce/branch1"].backward()
    assert made.heads[1].weight.grad.abs().sum() > 0 and made.heads[0].weight.grad is None
    assert next(made.cohort.branches[0].late.parameters()).grad is not None
    assert next(made.cohort.target.late.parameters()).grad is None and not made.bank.rows.requires_grad


def test_banks_remember_the_images_of_a_training_batch_alone() -> None:
    torch.manual_seed(0)
    made, images, indices = method(), torch.randn(4, 3, 32, 32), torch.tensor([3, 9, 20, 7])
    before = made.bank.rows.clone()
    assert before.norm(dim=2).mean() == pytest.approx(1, abs=0.01)
    made.eval()(images, LABELS[indices], indices)
    assert torch.equal(made.bank.rows, before)
    made.train()(images, LABELS[indices], indices)
    changed = (made.bank.rows != before).any(2)
    assert torch.equal(changed.nonzero()[:, 1].reshape(3, 4), indices.sort().values.expand(3, 4))
    torch.testing.assert_close(made.bank.rows[:, indices].norm(dim=2), torch.ones(3, 4))
    assert "bank.rows" in made.state_dict() and "bank.order" not in made.state_dict()


def test_banks_of_half_precision_are_compared_in_float32() -> None:
    made, images, indices = method(bank_dtype="float16"), torch.randn(4, 3, 32, 32), torch.tensor([3, 9, 20, 7])
    parts = made(images, LABELS[indices], indices)
    assert made.bank.rows.dtype == torch.float16 and parts["nce/target"].dtype == torch.float32
    sum(parts.values()).backward()
    torch.testing.assert_close(made.bank.rows[:, indices].float().norm(dim=2), torch.ones(3, 4), atol=1e-3, rtol=0)


def test_an_image_that_is_twice_in_a_batch_leaves_its_last_embedding() -> None:
    made, embeddings = method(2, momentum=0.0), nn.functional.normalize(torch.randn(2, 3, 128), dim=2)
    made.bank.update(torch.tensor([5, 6, 5]), list(embeddings))
    torch.testing.assert_close(made.bank.rows[:, 5], embeddings[:, 2])
    torch.testing.assert_close(made.bank.rows[:, 6], embeddings[:, 1])


def test_banks_are_as_large_as_the_card_says() -> None:
    cohort = Cohort(Tiny(100), torch.randn(2, 3, 32, 32), [Branch("early")] * 3, taps=MclOkd.taps)
    made = MclOkd(cohort, train_labels=torch.arange(50_000) % 100)
    assert made.bank.rows.nbytes == 4 * 50_000 * 128 * 4 and not made.bank.replacement
    assert MclOkd(cohort, train_labels=torch.arange(50_000) % 100, negatives=49_501).bank.replacement


def test_scores_of_a_low_temperature_stay_finite() -> None:
    memory = nn.functional.normalize(torch.randn(4, 9, 16), dim=2)
    embedding = memory[:, 0].clone().requires_grad_()
    nce(memory_scores(memory, embedding, 0.005), 1_000_000).backward()
    assert embedding.grad.isfinite().all()


def test_networks_of_unequal_width() -> None:
    images = torch.randn(4, 3, 32, 32)
    plan = MclOkd.plan(inspect(Tiny(), images), peers=[Tiny(width=5), Tokens()])
    made = MclOkd(Cohort(Tiny(), images, plan, taps=MclOkd.taps), train_labels=LABELS, negatives=8)
    sum(made(images, LABELS[:4], torch.arange(4)).values()).backward()
    assert [head.in_features for head in made.heads] == [32, 20, 16]
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize(
    ("model", "cut", "params"), [("resnet32_cifar", "stages.0", 1.82e6), ("resnet34", "layer2", None)]
)
def test_branches_have_the_last_two_stages_for_themselves(model: str, cut: str, params: float | None) -> None:
    side = 64 if model == "resnet34" else 32
    target = load_network(NetworkSettings(model=model), 100)
    plan = MclOkd.plan(inspect(target, torch.randn(2, 3, side, side)))
    assert len(plan) == 3 and {branch.cut for branch in plan} == {cut}
    if params:
        cohort = Cohort(target, torch.randn(2, 3, side, side), plan, taps=MclOkd.taps)
        assert sum(p.numel() for p in cohort.parameters()) == pytest.approx(params, abs=0.01e6)
