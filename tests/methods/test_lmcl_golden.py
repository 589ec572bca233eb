"""L-MCL against the numbers of the authors' own code (tests/golden/lmcl_*), in float64; the hyper-gradient is exact."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import okdc.networks  # noqa: F401 (registers the CIFAR networks)
from okdc.data.pairs import images_per_class, paired_order
from okdc.methods.shared.contrast import Bank, EmbeddingHead, mutual_contrast
from okdc.methods.shared.lookahead import Objective, descend, hypergradient
from okdc.methods.shared.towers import Aggregator, Matching, Taps
from tests.methods.golden import assert_same, load
from tests.methods.layered import method

TERMS = {"vcl": "alpha_vcl", "soft_vcl": "gamma_soft_vcl", "icl": "beta_icl", "soft_icl": "lam_soft_icl"}


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
