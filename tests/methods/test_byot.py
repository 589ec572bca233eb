"""BYOT beside equations 3 to 6 of the paper, written out image by image; exits of networks of one stage too."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn

import okdc
from okdc.methods.byot import Byot
from tests.helpers.networks import Depthwise, Tiny, Tokens


def method(network: type[nn.Module] = Tokens, **settings: float) -> Byot:
    torch.manual_seed(0)
    return okdc.build(network(), torch.randn(2, 3, 32, 32), Byot, **settings)  # type: ignore[return-value]


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(z / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def naive(z: list, deepest: list, feature: list, last: list, labels: list[int], alpha: float, t: float, weight: float):
    """The three losses of one exit: (1 - alpha) CE, alpha KL(deepest || exit), lambda ||F_i - F_C||^2, over images."""
    ce = kl = hint = 0.0
    for row, deep, x, y, label in zip(z, deepest, feature, last, labels, strict=True):
        ce -= math.log(softmax(row)[label])
        p, q = softmax(deep, t), softmax(row, t)
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        hint += sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    return (1 - alpha) * ce / len(z), alpha * kl / len(z), weight * hint / len(z)


def test_losses_and_gradients() -> None:
    byot = method(alpha=0.3, temperature=3.0, hint_weight=0.01)
    labels, draw = [1, 0, 3, 2, 2], torch.Generator().manual_seed(2)

    def drawn(width: int) -> Tensor:
        return torch.randn(5, width, generator=draw, dtype=torch.float64).requires_grad_()

    deepest, embedding = drawn(4), drawn(6)
    exits, features = [drawn(4) for _ in range(3)], [drawn(6) for _ in range(3)]
    parts = byot.self_losses(deepest, embedding, exits, features, torch.tensor(labels))
    assert list(parts) == [
        "ce/target", *(f"{kind}/exit{i}" for i in (1, 2, 3) for kind in ("ce", "kd", "hint")),
    ]  # fmt: skip
    own = -sum(math.log(softmax(row)[y]) for row, y in zip(deepest.tolist(), labels, strict=True)) / 5
    assert parts["ce/target"].item() == pytest.approx(own, rel=1e-9)
    for i, (z, x) in enumerate(zip(exits, features, strict=True), 1):
        expected = naive(z.tolist(), deepest.tolist(), x.tolist(), embedding.tolist(), labels, 0.3, 3.0, 0.01)
        found = [parts[f"{kind}/exit{i}"].item() for kind in ("ce", "kd", "hint")]
        assert found == pytest.approx(expected, rel=1e-9)
    sum(parts.values()).backward()
    assert embedding.grad is None  # what the exits are to be like is a constant
    of_labels = (deepest.detach().softmax(1) - nn.functional.one_hot(torch.tensor(labels), 4)) / 5
    torch.testing.assert_close(deepest.grad, of_labels)
    torch.testing.assert_close(features[0].grad, 0.01 * 2 * (features[0] - embedding).detach() / 5)


def test_exits_are_as_large_as_the_authors() -> None:
    """The weights of SepConv chains 64-128-256-512, 128-256-512 and 256-512, counted by hand from their resnet.py."""
    byot = okdc.build(timm.create_model("resnet18", num_classes=4), torch.randn(2, 3, 64, 64), Byot)
    assert [sum(p.numel() for p in leave.parameters()) for leave in byot.exits] == [268_800, 254_976, 202_752]


def given_by(network: nn.Module, name: str, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda *given: seen.append(given[2]))
    network(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("network", "places"),
    [(Tokens, ["blocks.0", "blocks.2", "blocks.3"]), (Depthwise, ["early"]), (Tiny, ["early"])],
)
def test_exits_are_learners_with_a_row_of_their_own(network: type[nn.Module], places: list[str]) -> None:
    byot = method(network).eval()
    names = ["target", *(f"exit{i}" for i in range(1, 1 + len(places)))]
    assert list(byot.learners) == [cost.name for cost in byot.costs()] == names
    assert [cost.cut for cost in byot.costs()[1:]] == places
    assert all(0 < cost.flops < byot.costs()[0].flops for cost in byot.costs()[1:])
    images = torch.randn(3, 3, 32, 32)
    out = byot.cohort(images)
    said = byot.said(out)
    for place, shown in zip(places, out.exit_maps, strict=True):  # what that module gives, looked at from outside
        seen = given_by(byot.cohort.target, place, images)
        torch.testing.assert_close(shown, seen.transpose(1, 2)[..., None] if seen.dim() == 3 else seen)
    torch.testing.assert_close(byot.ensemble(out), sum(said) / len(said))
    torch.testing.assert_close(byot.byproducts()["ensemble"].eval()(images), byot.ensemble(out))
