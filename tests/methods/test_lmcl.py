"""L-MCL against the numbers of the authors' own code (tests/golden/lmcl_*), in float64; the hyper-gradient is exact."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

import okdc.networks  # noqa: F401 (registers the CIFAR networks)
from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort
from okdc.data.pairs import images_per_class, paired_order
from okdc.errors import CutError, DataError, NetworkError, RecipeError
from okdc.methods.lmcl import Lmcl
from okdc.methods.shared.contrast import Bank, EmbeddingHead, mutual_contrast
from okdc.methods.shared.lookahead import Objective, descend, hypergradient
from okdc.methods.shared.towers import Aggregator, Matching, Taps, Towers, tap_places
from okdc.needs import Needs
from tests.helpers.networks import Depthwise, Tiny, Tokens
from tests.helpers.training import SETTINGS, Batches, run
from tests.methods.golden import assert_same, load

IMAGES, LABELS = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
TRAIN_LABELS = torch.arange(40) % 4
TERMS = {"vcl": "alpha_vcl", "soft_vcl": "gamma_soft_vcl", "icl": "beta_icl", "soft_icl": "lam_soft_icl"}


def method(target: nn.Module | None = None, peers: tuple[nn.Module, ...] = (), **settings: object) -> Lmcl:
    target = target or Tiny()
    plan = Lmcl.plan(inspect(target, IMAGES), peers=peers)
    return Lmcl(Cohort(target, IMAGES, plan), train_labels=TRAIN_LABELS, **settings)  # type: ignore[arg-type]


def settings_of(hyper: dict) -> dict[str, object]:
    return {key: hyper[name] for key, name in TERMS.items()} | {"tau": hyper["tau"], "temperature": hyper["T"]}


def fill(module: nn.Module, t: dict[str, Tensor], prefix: str) -> nn.Module:
    module.load_state_dict({key: t[f"{prefix}.{key}"] for key in module.state_dict()})
    return module


def golden_matching(t: dict[str, Tensor], dims: list[int], taps: int) -> Matching:
    matching = Matching([[d] * taps for d in dims]).double()
    for i, layers in enumerate(matching.projections):
        for k, layer in enumerate(layers):
            fill(layer, t, f"wnet{i}_{k}")
    return matching


def golden_heads(t: dict[str, Tensor], dims: list[int], taps: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.ModuleList(fill(EmbeddingHead(d, width).double(), t, f"head{i}_{k}") for k in range(taps))
        for i, d in enumerate(dims)
    )


def embedded(heads: nn.ModuleList, features: list[Tensor]) -> list[Tensor]:
    return [torch.stack([h(x) for h, x in zip(hs, xs, strict=True)]) for hs, xs in zip(heads, features, strict=True)]


def in_official_order(matched: dict[tuple[int, int], Tensor]) -> Tensor:
    """The weights of two networks as the code lists them: (0, 1) by layers k, l, then (1, 0) by layers l, k."""
    first = matched[0, 1]
    return torch.cat([first.flatten(0, 1), first.transpose(0, 1).flatten(0, 1)])


# --- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", TERMS)
def test_one_pair_of_layers(term: str) -> None:
    t, meta = load("lmcl_pair")
    a, b, w = (t[key].requires_grad_() for key in ("emb_a", "emb_b", "weight"))
    tau, temperature = meta["hyper"]["tau"], meta["hyper"]["T"]
    terms = mutual_contrast(
        [a[None], b[None]], t["labels"], None, {(0, 1): w[None, None]}, tau=tau, temperature=temperature
    )
    value = getattr(terms, term)
    assert_same(value, meta["expected"][term])
    value.backward()
    for key, leaf in (("a", a), ("b", b), ("w", w)):
        assert_same(leaf.grad, t[f"grad_{key}_{term}"], 2e-6)


def test_aggregator() -> None:
    t, meta = load("lmcl_aggregator")
    logits = t["logits"].requires_grad_()
    features = [t[f"features{i}"].requires_grad_() for i in range(2)]
    widths = [[d] * meta["hyper"]["S"] for d in meta["hyper"]["dims"]]
    mixed = torch.stack(
        [
            fill(Aggregator(w).double(), t, f"agg{i}")(z, x)
            for i, (w, z, x) in enumerate(zip(widths, logits, features, strict=True))
        ]
    )
    assert_same(mixed, t["aggregated"])
    (mixed * t["cotangent"]).sum().backward()
    assert_same(logits.grad, t["grad_logits"], 2e-6)
    for i, leaf in enumerate(features):
        assert_same(leaf.grad, t[f"grad_features{i}"], 2e-6)


def test_matching() -> None:
    t, meta = load("lmcl_weightnet")
    features = [t[f"features{i}"].requires_grad_() for i in range(2)]
    matching = golden_matching(t, meta["hyper"]["dims"], meta["hyper"]["S"])
    weights = in_official_order(matching(features))
    order = [tuple(pair.values()) for pair in meta["pair_order"]]
    assert order == [(i, k, 1 - i, m) for i in range(2) for k in range(3) for m in range(3)]
    assert_same(weights, t["weights"])
    (weights * t["cotangent"]).sum().backward()
    for i, leaf in enumerate(features):
        assert_same(leaf.grad, t[f"grad_features{i}"], 2e-6)
        for k, layer in enumerate(matching.projections[i]):
            assert_same(layer.weight.grad, t[f"grad_wnet{i}_{k}.weight"], 2e-6)


def test_total_loss_and_gradients() -> None:
    t, meta = load("lmcl_total")
    hyper, expected = meta["hyper"], meta["expected"]
    lmcl = method(**settings_of(hyper)).double()
    lmcl.matching = golden_matching(t, hyper["dims"], hyper["S"])
    lmcl.aggregators = nn.ModuleList(
        fill(Aggregator([d] * hyper["S"]).double(), t, f"agg{i}") for i, d in enumerate(hyper["dims"])
    )
    heads = golden_heads(t, hyper["dims"], hyper["S"], hyper["feat_dim"])
    logits = t["logits"].requires_grad_()
    features = [t[f"features{i}"].requires_grad_() for i in range(2)]
    taps = [Taps(*x) for x in zip(logits, features, embedded(heads, features), strict=True)]
    assert_same(in_official_order(lmcl.matching(features)), t["weights"])
    parts = lmcl.layered_losses(taps, t["labels"])
    for i, name in enumerate(lmcl.cohort.names):
        assert_same(lmcl.aggregators[i](taps[i].logits, taps[i].features), t["aggregated"][i])
        assert_same(parts[f"ce/{name}"], sum(expected["ce_stage"][i]))
        assert_same(parts[f"ce/{name}_mixed"], expected["ce_aggregated"][i])
    assert_same(parts["kd/target"] + parts["kd/peer1"], expected["logit_kd"])
    for term, weight in lmcl.weights.items():
        assert_same(parts[term] / weight, expected[term])
    total = sum(parts.values())
    assert_same(total, expected["loss"])
    total.backward()
    assert_same(logits.grad, t["grad_logits"], 2e-6)
    for i in range(2):
        assert_same(features[i].grad, t[f"grad_features{i}"], 2e-6)
        assert_same(heads[i][0].fc1.weight.grad, t[f"grad_head{i}_0.fc1.weight"], 2e-6)
        assert_same(lmcl.aggregators[i].fc2.weight.grad, t[f"grad_agg{i}.fc2.weight"], 2e-6)
    assert all(p.grad is None for p in lmcl.matching.parameters())


def test_memory_form() -> None:
    t, meta = load("lmcl_memory")
    hyper, expected = meta["hyper"], meta["expected"]["fixed"]
    bank = Bank(torch.arange(30) % 5, 2, hyper["feat_dim"], hyper["neg_k"], hyper["memory_momentum"]).double()
    bank.rows.copy_(torch.stack([t["memory0"], t["memory1"]]))
    features = [t[f"features{i}"].requires_grad_() for i in range(2)]
    embeddings = embedded(golden_heads(t, hyper["dims"], 2, hyper["feat_dim"]), features)
    # The file's weights are free: those of (0, 1) and of (1, 0) differ, and a pair of layers has both.
    weights = t["weights"].reshape(2, 2, 2, -1)
    matched = {(0, 1): weights[0] + weights[1].transpose(0, 1)}
    rows = bank.gather(torch.cat([t["pos_index"], t["neg_index"]], 1))
    terms = mutual_contrast(
        embeddings, torch.zeros(4), rows, matched, tau=hyper["tau"], temperature=hyper["T"]
    )._asdict()
    for term, value in terms.items():
        assert_same(value, expected[term])
    total = sum(hyper[TERMS[term]] * value for term, value in terms.items())
    assert_same(total, expected["weighted_total"])
    total.backward()
    bank.update(t["pos_index"][:, 0], [x[-1] for x in embeddings])
    for i in range(2):
        assert_same(features[i].grad, t[f"grad_features{i}_fixed"], 2e-6)
        assert_same(bank.rows[i], t[f"memory{i}_after"])


# --- the hyper-gradient ---------------------------------------------------------------------------------------------


def unrolled(
    steps: list[Objective], final: Objective, theta: list[Tensor], phi: list[Tensor], *, lr: float, momentum: float,
    weight_decay: float,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """The same by keeping the graph of every step: the hyper-gradient, where the steps led, and all values."""
    phi = [p.detach().requires_grad_() for p in phi]
    here, values = [x.detach().requires_grad_() for x in theta], []
    velocity = [torch.zeros_like(x) for x in theta]
    for objective in steps:
        values.append(objective(here, phi))
        gradient = torch.autograd.grad(values[-1], here, create_graph=True, allow_unused=True, materialize_grads=True)
        velocity = [momentum * v + g + weight_decay * x for v, g, x in zip(velocity, gradient, here, strict=True)]
        here = [x - lr * v for x, v in zip(here, velocity, strict=True)]
    values.append(final(here, phi))
    return list(torch.autograd.grad(values[-1], phi)), here, values


def toy_inner(theta: list[Tensor], phi: list[Tensor]) -> Tensor:
    return theta[0].square().mean() + (phi[0] * theta[1].square()).sum() + (theta[0] * theta[1]).square().mean()


def toy_outer(theta: list[Tensor], phi: list[Tensor]) -> Tensor:
    return (theta[0] * theta[1]).mean() + theta[1].pow(3).mean()


def options(hyper: dict) -> dict[str, float]:
    return {key: hyper[key] for key in ("lr", "momentum", "weight_decay")}


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_hypergradient_of_a_toy(count: int) -> None:
    t, meta = load("lmcl_hypergrad_toy")
    theta, phi, steps = [t["theta1"], t["theta2"]], [t["phi"]], [toy_inner] * count
    simple, end, values = unrolled(steps, toy_outer, theta, phi, **options(meta["hyper"]))
    (found,) = hypergradient(steps, toy_outer, theta, phi, **options(meta["hyper"]))
    assert_same(found, t[f"hypergrad_K{count}_exact"])
    assert_same(simple[0], t[f"hypergrad_K{count}_exact"])
    assert_same(found, simple[0], 1e-12)
    assert_same(values[-1], meta["expected"][f"K{count}"]["outer_value"])
    for k, x in enumerate(end):
        assert_same(x, t[f"theta{k + 1}_K{count}"])


def test_hypergradient_of_the_official_self_test() -> None:
    t, meta = load("lmcl_hypergrad_selftest")
    hyper = meta["hyper"]
    (found,) = hypergradient(
        [lambda theta, phi: theta[0].square().mean() + (phi[0] * theta[1].square()).sum()] * hyper["K"],
        lambda theta, phi: (theta[0] * theta[1]).mean(),
        [t["theta1"], t["theta2"]], [t["phi"]], **options(hyper),
    )  # fmt: skip
    assert_same(found, t["hypergrad_exact"])


def test_hypergradient_replays_random_numbers() -> None:
    torch.manual_seed(0)
    theta, phi = [torch.randn(6).double(), torch.randn(6).double()], [torch.randn(6).double()]

    def noisy(theta: list[Tensor], phi: list[Tensor]) -> Tensor:
        kept = nn.functional.dropout(theta[0], 0.5) * random.random()
        return (kept * theta[1] * phi[0]).sin().sum() + toy_inner(theta, phi)

    found = []
    for way in (lambda *a, **k: hypergradient(*a, **k)[0], lambda *a, **k: unrolled(*a, **k)[0][0]):
        torch.manual_seed(1), random.seed(1)
        found.append(way([noisy, noisy, toy_outer], noisy, theta, phi, lr=0.1, momentum=0.9, weight_decay=0.01))
    assert_same(found[0], found[1], 1e-12)


class GoldenNetworks(nn.Module):
    """The two small networks of lmcl_metastep: f_ij = tanh(stage_ij(tanh(trunk_i(x)))), and a classifier on each."""

    def __init__(self, t: dict[str, Tensor], hyper: dict) -> None:
        super().__init__()
        parts = {}
        for key in (k.removeprefix("net.").removesuffix(".weight") for k in t if k.startswith("net.")):
            if not key.endswith(".bias"):
                parts[key] = fill(nn.Linear(*t[f"net.{key}.weight"].shape[::-1]).double(), t, f"net.{key}")
        self.net = nn.ModuleDict(parts)
        self.heads = golden_heads(t, hyper["dims"], hyper["S"], hyper["feat_dim"])

    def forward(self, x: Tensor) -> list[Taps]:
        found = []
        for i in range(2):
            hidden = self.net[f"trunk{i}"](x).tanh()
            features = torch.stack([self.net[f"stage{i}_{k}"](hidden).tanh() for k in range(2)])
            logits = torch.stack([self.net[f"cls{i}_{k}"](features[k]) for k in range(2)])
            found.append(Taps(logits, features, torch.stack([h(f) for h, f in zip(self.heads[i], features)])))
        return found


def test_meta_step() -> None:
    t, meta = load("lmcl_metastep")
    hyper, expected = meta["hyper"], meta["expected"]["exact"]
    lmcl = method(
        **settings_of(hyper), meta_steps=hyper["times"], meta_momentum=hyper["momentum"],
        meta_weight_decay=hyper["weight_decay"],
    ).double()  # fmt: skip
    lmcl.towers = GoldenNetworks(t, hyper)  # type: ignore[assignment]
    lmcl.matching = golden_matching(t, hyper["dims"], hyper["S"]).requires_grad_(False)
    lmcl.matching_momentum = torch.zeros(sum(p.numel() for p in lmcl.matching.parameters())).double()
    lmcl.lr.fill_(hyper["lr"])
    before = copy.deepcopy(lmcl.towers.state_dict())
    found = dict(zip(dict(lmcl.matching.named_parameters()), lmcl.meta_gradient([(t["x"], t["labels"])]), strict=True))
    everything = max(float(t[k].abs().max()) for k in t if k.startswith("hypergrad_exact"))
    assert len(found) == 8
    for key, h in found.items():
        _, i, k, kind = key.split(".")
        expected_h = t[f"hypergrad_exact.wnet{i}_{k}.{kind}"]
        assert (h - expected_h).abs().max() <= 1e-6 * everything
        assert_same(h / everything, expected_h / everything)
    descend(list(lmcl.matching.parameters()), list(found.values()), lmcl.matching_momentum, lmcl.lr, **lmcl.meta_sgd)
    for i in range(2):
        for k in range(2):
            assert_same(lmcl.matching.projections[i][k].weight, t[f"wnet_after{i}_{k}.weight"])
    assert all(torch.equal(value, before[key]) for key, value in lmcl.towers.state_dict().items())
    names, start = zip(*lmcl.towers.named_parameters(), strict=True)
    matching = golden_matching(t, hyper["dims"], hyper["S"])

    def contrast(theta: list[Tensor], phi: list[Tensor]) -> Tensor:
        taps = functional_call(lmcl.towers, dict(zip(names, theta)), (t["x"],))
        matched = functional_call(matching, dict(zip(found, phi)), ([x.features for x in taps],))
        return sum(lmcl._contrast(taps, t["labels"], matched, None, None).values())  # type: ignore[return-value]

    def labelled(theta: list[Tensor], phi: list[Tensor]) -> Tensor:
        taps = functional_call(lmcl.towers, dict(zip(names, theta)), (t["x"],))
        return sum(lmcl._labelled(x, t["labels"]) for x in taps)  # type: ignore[return-value]

    simple, _, values = unrolled(
        [contrast, contrast, labelled], labelled, list(start), list(matching.parameters()), **options(hyper)
    )
    for got, value in zip(values, [*expected["inner_values"], *list(expected.values())[1:]], strict=True):
        assert_same(got, value)
    for mine, theirs in zip(found.values(), simple, strict=True):
        assert_same(mine / everything, theirs / everything, 1e-9)


# --- batches --------------------------------------------------------------------------------------------------------


def test_sampler_has_the_properties_of_the_official_one() -> None:
    t, meta = load("lmcl_sampler")
    hyper, labels = meta["hyper"], t["labels"]
    batch, count = hyper["batch_size"], images_per_class(labels, hyper["batch_size"])
    assert count == hyper["m_per_class"]
    mine = paired_order(labels, batch, count, torch.Generator().manual_seed(0))
    plenty = labels.bincount() >= count
    for order in (mine, t["indices_example"]):
        assert_same(torch.tensor(len(order)), hyper["list_size"])
        assert len(order) == len(labels) - len(labels) % batch
        for images in order.reshape(-1, batch // count, count):
            classes = labels[images]
            assert (classes == classes[:, :1]).all() and len(classes[:, 0].unique()) == batch // count
            assert all(len(pair.unique()) == count for pair in images if plenty[labels[pair[0]]])
    assert len(mine.unique()) < len(mine)  # batches are drawn independently


# --- behaviour ------------------------------------------------------------------------------------------------------


def take_step(lmcl: Lmcl, optimizer: torch.optim.Optimizer) -> None:
    lmcl.lr.fill_(0.05)
    sum(lmcl.train()(IMAGES, LABELS).values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    lmcl.after_step([(IMAGES, LABELS)])


def sgd(lmcl: Lmcl) -> torch.optim.Optimizer:
    return torch.optim.SGD(lmcl.param_groups(0.05), lr=0.05, momentum=0.9)


def phi(lmcl: Lmcl) -> Tensor:
    return nn.utils.parameters_to_vector(lmcl.matching.parameters()).clone()


def test_the_matching_moves_at_the_first_and_every_nth_step_of_an_epoch_and_never_else() -> None:
    torch.manual_seed(0)
    lmcl = method(Depthwise(), meta_every=3)
    trained = {id(p) for group in lmcl.param_groups(0.1) for p in group["params"]}
    assert trained == {id(p) for p in lmcl.parameters()} - {id(p) for p in lmcl.matching.parameters()}
    optimizer, moved = sgd(lmcl), []
    for epoch in (0, 1):
        lmcl.epoch.fill_(epoch)
        for _ in range(4 if epoch == 0 else 2):
            before = phi(lmcl)
            take_step(lmcl, optimizer)
            moved.append(not torch.equal(before, phi(lmcl)))
            lmcl.epoch.fill_(epoch)  # written again, though it is the same epoch, as after a step that was skipped
    assert moved == [True, False, False, True, True, False]


@pytest.mark.parametrize("network", [Tiny, Depthwise, Tokens])
def test_a_meta_step_leaves_networks_buffers_and_random_numbers_as_they_were(network: type[nn.Module]) -> None:
    lmcl = method(network(), meta_every=1).train()
    lmcl.lr.fill_(0.05)
    before, start = copy.deepcopy(lmcl.state_dict()), phi(lmcl)
    torch.manual_seed(4), random.seed(4)
    lmcl.after_step([(IMAGES, LABELS)])
    drawn = torch.rand(1), random.random()
    torch.manual_seed(4), random.seed(4)
    assert drawn == (torch.rand(1), random.random())
    assert not torch.equal(start, phi(lmcl)) and torch.isfinite(phi(lmcl)).all()
    after = {key: value for key, value in lmcl.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in after} == {"matching", "matching_momentum", "_extra_state"}
    assert all(p.grad is None for p in lmcl.parameters())


@pytest.mark.parametrize("network", [Depthwise, Tokens])
def test_a_look_ahead_moves_the_very_parameters_that_training_moves(network: type[nn.Module]) -> None:
    lmcl = method(network()).eval()
    twin = copy.deepcopy(lmcl)
    moved = {name: p + 0.1 * torch.randn_like(p) for name, p in lmcl.towers.named_parameters()}
    with torch.no_grad():
        for name, p in twin.towers.named_parameters():
            p.copy_(moved[name])
    ahead = functional_call(lmcl.towers, moved, (IMAGES,))
    for mine, theirs in zip(ahead, twin.towers(IMAGES), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
    assert not torch.equal(ahead[0].logits, lmcl.towers(IMAGES)[0].logits)


def test_resume_is_exact_with_the_momentum_of_the_matching() -> None:
    def fresh() -> tuple[Lmcl, torch.optim.Optimizer]:
        torch.manual_seed(0)
        lmcl = method(meta_every=2)
        return lmcl, sgd(lmcl)

    straight, first = fresh()
    for _ in range(3):
        take_step(straight, first)
    assert straight.matching_momentum.abs().max() > 0
    saved = copy.deepcopy((straight.state_dict(), first.state_dict()))
    resumed, second = fresh()
    resumed.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    for lmcl, optimizer in ((straight, first), (resumed, second)):
        before = phi(lmcl)
        take_step(lmcl, optimizer)
        assert torch.equal(phi(lmcl), before)
        take_step(lmcl, optimizer)
        assert not torch.equal(phi(lmcl), before)
    for mine, theirs in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


class Numbered(Batches):
    """With each image's number in a bank of two images, one of each class, of which nothing is drawn by chance."""

    def batches(self, epoch: int, start: int = 0):
        return ((images, labels, labels) for images, labels in super().batches(epoch, start))


def test_accumulated_batches_move_the_matching_as_one_big_batch_does(tmp_path: Path) -> None:
    class Certain(Tokens):
        """Without dropout."""

        def __init__(self) -> None:
            super().__init__(depth=3)
            for block in self.blocks:
                block.dropout = block.dropout1 = block.dropout2 = nn.Identity()
                block.self_attn.dropout = 0.0

    images, labels = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.arange(16) % 2

    def trained(batch: int, accumulated: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        plan = Lmcl.plan(inspect(Certain(), IMAGES))
        lmcl = Lmcl(  # banks that stay as they are: the second batch would find in them what the first has left
            Cohort(Certain(), IMAGES, plan), train_labels=torch.arange(2), memory=True, memory_momentum=1.0,
            negatives=3, meta_every=1,
        ).double()  # fmt: skip
        lmcl.bank.rows.copy_(nn.functional.normalize(lmcl.bank.rows, dim=2))
        data = SimpleNamespace(train=Numbered(images, labels, batch), validation=None, held_out=None)
        settings = replace(SETTINGS, epochs=1, lr=0.01, batch_size=batch, grad_accum_steps=accumulated)
        return run(tmp_path / str(batch), settings, method=lmcl, data=data).method.state_dict()

    big, small = trained(8, 1), trained(4, 2)
    assert big["matching_momentum"].abs().max() > 0
    for name, value in big.items():
        torch.testing.assert_close(small[name], value, rtol=1e-9, atol=1e-12)


def test_a_batch_without_any_pair_is_finite_and_so_is_its_meta_step() -> None:
    lmcl = method(meta_every=1).train()
    lmcl.lr.fill_(0.05)
    images, labels = IMAGES[:4], torch.arange(4)
    parts = lmcl(images, labels)
    assert parts["vcl"] == 0 and parts["icl"] == 0 and torch.isfinite(sum(parts.values()))
    found = lmcl.meta_gradient([(images, labels)])
    assert all(torch.isfinite(h).all() for h in found) and any(h.abs().max() > 0 for h in found)


def test_a_hypergradient_that_is_not_finite_moves_nothing() -> None:
    weight, velocity = nn.Parameter(torch.ones(2)), torch.ones(2)
    descend([weight], [torch.tensor([1.0, torch.inf])], velocity, torch.ones(()), momentum=0.9, weight_decay=0.1)
    assert torch.equal(weight, torch.ones(2)) and torch.equal(velocity, torch.ones(2))


def test_inputs_of_the_matching_may_be_constants() -> None:
    torch.manual_seed(0)
    lmcl = method(meta_every=1).double()
    lmcl.lr.fill_(0.1)
    images = IMAGES.double()
    through = lmcl.meta_gradient([(images, LABELS)])
    lmcl.detach_weight_inputs = True
    assert any(not torch.allclose(x, y, rtol=1e-6) for x, y in zip(through, lmcl.meta_gradient([(images, LABELS)])))


def test_where_networks_are_tapped() -> None:
    places = {kind.__name__: tap_places(inspect(kind(), IMAGES)) for kind in (Tiny, Depthwise, Tokens)}
    assert places == {"Tiny": ["early"], "Depthwise": ["early"], "Tokens": ["blocks.1", "blocks.3"]}


def test_branches_are_as_large_as_the_spec_counts_them() -> None:
    small = timm.create_model("resnet32_cifar", num_classes=100)
    lmcl = method(small, (timm.create_model("resnet32_cifar", num_classes=100),))
    assert round(sum(c.own_params for c in lmcl.costs()) / 1e6, 2) == 2.56
    taps = [f"{name}_tap{k}" for name in ("target", "peer1") for k in (1, 2)]
    assert [c.name for c in lmcl.costs()] == ["target", "peer1", *taps]
    towers = Towers(Cohort(timm.create_model("resnet18"), torch.randn(2, 3, 32, 32)), 128, short=True)
    assert round(sum(c.own_params for c in towers.cohorts[0].costs[1:]) / 1e6, 1) == 14.6
    towers.strip()
    assert [c.grown for c in towers.cohorts[0].costs][-1] == "1 fewer in layer4"


def test_short_branches_of_a_transformer_keep_one_block() -> None:
    lmcl = method(Tokens(), branch_depth="first_block")
    branches = lmcl.towers.cohorts[0].branches
    assert [sum(isinstance(block, nn.TransformerEncoderLayer) for block in b.blocks) for b in branches] == [1, 1]
    parts = lmcl.train()(IMAGES, LABELS)
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in lmcl.parameters() if p.requires_grad)


def test_peers_of_other_widths_and_numbers_of_stages_with_banks() -> None:
    lmcl = method(Tiny(), (Tokens(), Depthwise()), memory=True, negatives=16, meta_every=1).train()
    assert [len(w) for w in lmcl.towers.widths] == [2, 3, 2]
    indices, before = torch.arange(8), lmcl.bank.rows.clone()
    parts = lmcl(IMAGES, LABELS, indices)
    assert len(parts) == 13 and all(torch.isfinite(v) for v in parts.values())
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in lmcl.parameters() if p.requires_grad)
    assert not torch.equal(lmcl.bank.rows[:, :8], before[:, :8]) and torch.equal(lmcl.bank.rows[:, 8:], before[:, 8:])
    lmcl.lr.fill_(0.05)
    start, rows = phi(lmcl), lmcl.bank.rows.clone()
    lmcl.after_step([(IMAGES, LABELS, indices)])
    assert not torch.equal(start, phi(lmcl)) and torch.equal(rows, lmcl.bank.rows)


class DifferentiableOnce(Tiny):
    """torch has no second derivative of its fused attention, which this network asks for by name."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.early(self.stem(x))).flatten(2).mT[:, None].contiguous()
        x = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]
        return self.head(x.mean((1, 2)))


class Moody(Tiny):
    """What it does depends on how often it has run, so that no branch can be proved."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        Moody.runs += 1
        return super().forward(x) * Moody.runs


class NothingToPartAfter(nn.Module):
    """A network whose whole work is its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.head = nn.AvgPool2d(16), nn.Conv2d(3, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(x)).flatten(1)


def hooks(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@pytest.mark.parametrize(
    ("peer", "error", "said"),
    [
        (DifferentiableOnce, NetworkError, "flash_attention.*--method mcl"),
        (Moody, CutError, r"after each of early, but Moody .* gives other logits \(by .*\)\. Choose --method mcl"),
        (NothingToPartAfter, NetworkError, "no stages that okdc can see"),
    ],
)
def test_what_cannot_be_built_is_refused_and_leaves_the_target_alone(
    peer: type[nn.Module], error: type[Exception], said: str
) -> None:
    target = Tiny()
    with pytest.raises(error, match=said):
        method(target, (peer(),))
    assert hooks(target) == 0


def test_refusals_and_needs() -> None:
    with pytest.raises(RecipeError, match=r"share a trunk.*--share none"):
        Lmcl(Cohort(Tiny(), IMAGES, [Branch("early")]))
    with pytest.raises(RecipeError, match="meta_every=0"):
        Lmcl(Cohort(Tiny(), IMAGES, [Branch()]), meta_every=0)
    with pytest.raises(DataError, match="memory=false"):
        Lmcl(Cohort(Tiny(), IMAGES, [Branch()]), memory=True)
    assert Lmcl.needs(memory=True) == Needs(indices=True, mixed=True)
    assert Lmcl.needs(tau=0.1) == Needs(pairs=True, mixed=True)


@pytest.mark.parametrize("memory", [False, True])
def test_mixed_images_in_losses_and_meta_steps(memory: bool) -> None:
    images, classes = IMAGES.double(), torch.nn.functional.one_hot(LABELS, 4).double()
    indices = torch.stack([torch.arange(8), torch.arange(8).flip(0)], 1)

    def found(*batch: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        lmcl = method(memory=memory, negatives=6).double()
        torch.manual_seed(1)
        parts = lmcl(*batch)
        lmcl.lr.fill_(0.1)
        torch.manual_seed(2)
        return [*parts.values(), *lmcl.meta_gradient([batch])]

    plain = found(images, LABELS, *([indices[:, 0]] if memory else []))
    alone = found(images, classes, indices, torch.ones(8))
    halved = found(images, (classes + classes.flip(0)) / 2, indices, torch.full((8,), 0.5))
    for mine, theirs in zip(plain, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(plain[-1], halved[-1], rtol=1e-3)
    if not memory:  # a bank draws others for the first than for the second
        swapped = found(images, (classes + classes.flip(0)) / 2, indices.flip(1), torch.full((8,), 0.5))
        for mine, theirs in zip(halved, swapped, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
