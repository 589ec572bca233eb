"""L-MCL: when the matching moves, what a meta step leaves alone, where networks are tapped, and what is refused."""

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
from okdc.errors import CutError, DataError, NetworkError, RecipeError
from okdc.methods.lmcl import Lmcl
from okdc.methods.shared.lookahead import descend
from okdc.methods.shared.towers import Towers, tap_places
from okdc.needs import Needs
from tests.helpers.networks import Depthwise, Tiny, Tokens
from tests.helpers.training import SETTINGS, Batches, run
from tests.methods.layered import IMAGES, LABELS, method


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
