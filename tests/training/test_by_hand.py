"""Whole trainings beside the same written out by hand for one network: steps that are right may still add up wrong.

Nothing of okdc is used by hand: convolutions and norms as functions of named weights, each method's formula as its
paper writes it, momentum and cosine as textbooks do. All in float64, so that nothing hides behind rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from okdc import methods
from okdc.cohort import Branch, Cohort
from okdc.recipe import TrainSettings
from okdc.training import fit
from tests.helpers.networks import Tiny
from tests.helpers.training import Batches

Weights = dict[str, Tensor]
CLASSES, BATCH, STEPS, EPOCHS = 4, 8, 6, 9  # 54 steps
SETTINGS = TrainSettings(
    epochs=EPOCHS, batch_size=BATCH, opt="momentum", lr=0.05, weight_decay=1e-3, device="cpu", log_interval=100,
    clip_grad=0,
)  # fmt: skip


def data() -> SimpleNamespace:
    labels = torch.arange(BATCH * STEPS) % CLASSES
    draw = torch.Generator().manual_seed(3)
    images = torch.randn(len(labels), 3, 12, 12, generator=draw, dtype=torch.float64) + labels.view(-1, 1, 1, 1)
    return SimpleNamespace(train=Batches(images, labels, BATCH), validation=None, held_out=None)


# --- the network by hand ----------------------------------------------------------------------------------------------


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """Batch norm of a batch; its running statistics move by a tenth."""
    return F.batch_norm(
        x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"], True, 0.1, 1e-5
    )


def layer(x: Tensor, w: Weights, name: str, stride: int) -> Tensor:
    return norm(F.conv2d(x, w[f"{name}.0.weight"], stride=stride, padding=1), w, f"{name}.1").relu()


def trunk(x: Tensor, w: Weights, member: str) -> Tensor:
    return layer(layer(x, w, f"{member}.stem", 1), w, f"{member}.early", 2)


def tail(shared: Tensor, w: Weights, member: str) -> tuple[Tensor, Tensor]:
    """Feature map and logits."""
    features = layer(shared, w, f"{member}.late", 2)
    return features, F.linear(features.mean((2, 3)), w[f"{member}.head.weight"], w[f"{member}.head.bias"])


def gate(features: Tensor, w: Weights, fc: str, bn: str) -> Tensor:
    return norm(F.linear(features.mean((2, 3)), w[f"{fc}.weight"], w[f"{fc}.bias"]), w, bn).relu().softmax(1)


def divergence(teacher: Tensor, student: Tensor, temperature: float, eps: float = 0.0) -> Tensor:
    """T^2 sum p (log p - log q), the mean over the images."""
    p, q = (teacher / temperature).softmax(1) + eps, (student / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum() / len(p)


def rising(epoch: int, length: float) -> float:
    return math.exp(-5 * (1 - min(epoch / length, 1)) ** 2)


# --- the methods by hand ----------------------------------------------------------------------------------------------

MEMBERS = ("cohort.target", "cohort.branches.0", "cohort.branches.1")


def one(x: Tensor, y: Tensor, w: Weights, epoch: int) -> Tensor:
    """ONE (Lan et al. 2018): a gate on the trunk weighs the branches, and their mixture teaches each of them."""
    shared = trunk(x, w, MEMBERS[0])
    branches = [tail(shared, w, member)[1] for member in MEMBERS]
    weights = gate(shared, w, "gate.fc", "gate.bn")
    mixture = sum(weights[:, i, None] * branches[i] for i in range(3))
    loss = F.cross_entropy(mixture, y)  # type: ignore[arg-type]
    for z in branches:
        taught = divergence(mixture.detach(), z, 3.0, 1e-7)  # type: ignore[union-attr]
        loss = loss + F.cross_entropy(z, y) + rising(epoch, EPOCHS * 80 / 300) * taught
    return loss


def dml(x: Tensor, y: Tensor, w: Weights, epoch: int) -> Tensor:
    """Deep mutual learning (Zhang et al. 2018) of two networks that share nothing."""
    a, b = (tail(trunk(x, w, member), w, member)[1] for member in MEMBERS[:2])
    mutual = divergence(b.detach(), a, 1.0) + divergence(a.detach(), b, 1.0)
    return F.cross_entropy(a, y) + F.cross_entropy(b, y) + mutual


def ahbf(x: Tensor, y: Tensor, w: Weights, epoch: int) -> Tensor:
    """AHBF (Gong et al. 2023): a branch is fused into the assistant, which teaches the one before and the branch."""
    shared = trunk(x, w, MEMBERS[0])
    parts = [tail(shared, w, member) for member in MEMBERS]
    features, assistant = parts[0]
    loss = sum(F.cross_entropy(z, y) for _, z in parts)
    for i, (own, z) in enumerate(parts[1:]):
        place = f"fusions.{i}"
        merged = F.conv2d(torch.cat([features, own], 1), w[f"{place}.conv.weight"], w[f"{place}.conv.bias"])
        features = norm(merged, w, f"{place}.bn")
        weights = gate(features, w, f"{place}.gate_fc", f"{place}.gate_bn")
        following = weights[:, :1] * assistant + weights[:, 1:] * z
        from_assistant = divergence(following, assistant, 3.0, 1e-7) + divergence(following, z, 3.0, 1e-7)
        from_branch = divergence(z, assistant, 3.0, 1e-7)
        taught = 2 * from_assistant + 4 * from_branch
        loss = loss + F.cross_entropy(following, y) + rising(epoch, EPOCHS) * taught
        assistant = following
    return loss  # type: ignore[return-value]


def train(loss: Callable[..., Tensor], start: Weights, learning: list[str]) -> Weights:
    """Momentum 0.9, weight decay on everything, a cosine over the epochs."""
    w = {name: value.clone() for name, value in start.items()}
    speed = {name: torch.zeros_like(w[name]) for name in learning}
    batches = data().train
    for epoch in range(EPOCHS):
        rate = SETTINGS.lr / 2 * (1 + math.cos(math.pi * epoch / EPOCHS))  # type: ignore[operator]
        for x, y in batches.batches(epoch):
            leaves = {name: w[name].detach().requires_grad_() for name in learning}
            gradients = torch.autograd.grad(loss(x, y, w | leaves, epoch), list(leaves.values()))
            for name, gradient in zip(leaves, gradients, strict=True):
                speed[name] = 0.9 * speed[name] + gradient + SETTINGS.weight_decay * w[name]
                w[name] = w[name] - rate * speed[name]
    return w


@pytest.mark.parametrize(
    ("loss", "branches", "settings"),
    [(one, 2, {"cut": "early"}), (dml, 1, None), (ahbf, 2, {"cut": "early"})],
    ids=["one", "dml", "ahbf"],
)
def test_a_whole_training_is_the_one_written_out_by_hand(
    tmp_path: Path, loss: Callable[..., Tensor], branches: int, settings: dict[str, Any] | None
) -> None:
    torch.manual_seed(5)
    kind = methods.get(loss.__name__)
    plan = [Branch(**settings) if settings else Branch(network=Tiny(CLASSES)) for _ in range(branches)]
    method = kind(Cohort(Tiny(CLASSES), torch.randn(2, 3, 12, 12), plan, taps=kind.taps)).double()
    start = {name: value.clone() for name, value in method.state_dict().items()}
    learning = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    expected = train(loss, start, learning)
    state = fit(method, data(), SETTINGS, tmp_path, arch="tiny", recipe={})  # type: ignore[arg-type]
    assert len(state.history) == EPOCHS
    found = method.state_dict()
    for name in learning + [name for name in found if "running" in name]:
        assert torch.allclose(found[name], expected[name], rtol=0, atol=1e-9), name
    moved = max((found[name] - start[name]).abs().max().item() for name in learning)
    assert moved > 0.1  # it did learn something
