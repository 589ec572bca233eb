"""Sharing is exact, branches differ at birth, strip gives the user's object back."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from okdc.anatomy import inspect
from okdc.anatomy.modes import unchanged
from okdc.cohort import Branch, Cohort
from okdc.cohort.replay import Replay
from okdc.errors import NetworkError
from okdc.system.randomness import random_state, set_random_state
from tests.helpers import networks, traps
from tests.helpers.cohorts import example, with_weights_of_target

TRAPS = [
    traps.ControlFlow,
    traps.ChangesInPlace,
    traps.CalledTwice,
    traps.Tuples,
    traps.Lists,
    traps.Counting,
    traps.ReadsAttribute,
    networks.Tokens,
]
ZOO = {
    "resnet18": (64, "layer2"),
    "resnet32_cifar": (32, "stages.1"),
    "mobilenetv3_small_100": (64, None),
    "efficientnet_b0": (64, None),
    "convnext_atto": (64, None),
    "vit_tiny_patch16_224": (224, "blocks.7"),
    "swin_tiny_patch4_window7_224": (224, None),
    "ghostnet_100": (64, None),
    "hrnet_w18_small": (64, None),
    "densenet121": (64, None),
    "vgg11_bn": (64, None),
    "torchvision/resnet18": (64, "layer2"),
    "torchvision/shufflenet_v2_x1_0": (64, None),
    "torchvision/vit_b_16": (32, None),
}


def build(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "torchvision/vit_b_16":
        return torchvision.models.VisionTransformer(32, 8, 6, 2, 32, 64, num_classes=10)
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.removeprefix("torchvision/"), num_classes=10)
    import okdc.networks  # noqa: F401 (registers the CIFAR networks)

    small = {"mlp_ratio": 0.02} if name == "vgg11_bn" else {}
    return timm.create_model(name, num_classes=10, **small)


@pytest.mark.parametrize("kind", TRAPS, ids=lambda kind: kind.__name__)
def test_traps_are_shared_exactly(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    cuts = [c.name for c in inspect(kind(), example()).cuts]
    assert len(cuts) > 3
    for cut in cuts:  # construction proves equal logits in evaluation and in training mode, or raises
        cohort = with_weights_of_target(Cohort(kind(), example(), [Branch(cut), Branch(cut)]))
        out = cohort.eval()(example())
        assert torch.equal(out.logits[0], out.logits[1]) and torch.equal(out.logits[0], out.logits[2]), cut


@pytest.mark.parametrize("name", ZOO)
def test_networks_of_every_kind(name: str) -> None:
    size, expected_cut = ZOO[name]
    target = build(name, size)
    keys = list(target.state_dict())
    flags = [getattr(m, "inplace", None) for m in target.modules()]
    images = example(size)
    with torch.no_grad():
        before = target.eval()(images)
    anatomy = inspect(target, images)
    cut = anatomy.cut()
    if expected_cut:
        assert anatomy.cut(2 if len(anatomy.stages) >= 4 else 1) == expected_cut
    assert anatomy.find_cut(cut).flops_after >= 0.05
    stages = len(anatomy.stages_after(cut))
    taps = ("feature_maps", "embeddings")
    cohort = Cohort(target, images, [Branch(cut, (1,) * stages), Branch(cut, (2,) * stages)], taps=taps)
    assert all(cohort.grown), "every branch grew"
    out = cohort.train()(images)
    sum(z.sum() for z in out.logits).backward()
    assert [n for n, p in cohort.named_parameters() if p.grad is None] == []
    assert cohort.costs[2].params > cohort.costs[1].params and cohort.costs[2].flops > cohort.costs[1].flops
    assert len({tuple(e.flatten().tolist()) for e in out.embeddings}) == 3, "members disagree at birth"
    student = cohort.strip()
    assert student is target and list(student.state_dict()) == keys
    assert [getattr(m, "inplace", None) for m in student.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks or isinstance(m, Replay) for m in student.modules())
    fresh = build(name, size)
    with torch.no_grad():  # construction on trial left weights and buffers as they were
        torch.testing.assert_close(fresh.eval()(images), before)


def test_branches_that_part_at_two_cuts() -> None:
    class Functional(networks.Tiny):
        """Changes each stage's output in place: what one cut needs carried, the other may not know."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu_(self.stem(x))
            x = torch.relu_(self.early(x))
            return self.head(torch.relu_(self.late(x)).mean((2, 3)))

    for cuts in (("stem", "early"), ("early", "stem"), ("stem", "early", "late.0")):
        torch.manual_seed(0)
        target = Functional()
        for stage in (target.stem, target.early, target.late):
            del stage[2]
        cohort = with_weights_of_target(Cohort(target, example(), [Branch(cut) for cut in cuts])).eval()
        out = cohort(example())
        assert all(torch.equal(z, out.logits[0]) for z in out.logits), cuts


def test_a_shared_activation_is_not_what_growth_is_appended_to() -> None:
    act = nn.ReLU()

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), act, nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), act,
                nn.Conv2d(16, 16, 3, padding=1), act,
            )  # fmt: skip
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.f(x).mean((2, 3)))

    cohort = Cohort(Flat(), example(), [Branch("f.2", (2,))])
    assert cohort.grown == ["2 x Conv2d after f.5"]


def test_own_block_or_fallback() -> None:
    resnet = timm.create_model("resnet18", num_classes=4)
    images = example(64)
    assert Cohort(resnet, images, [Branch("layer3", (2,))]).grown == ["2 x BasicBlock after layer4.1"]
    assert Cohort(networks.Tiny(), example(), [Branch("early", (1,))]).grown == [
        "1 x Conv2d-BatchNorm2d-ReLU after late.2"
    ]
    vgg = timm.create_model("vgg11_bn", num_classes=4, mlp_ratio=0.02)
    cohort = Cohort(vgg, images, [Branch("features.21", (1,))])
    assert cohort.grown == ["1 x Conv2d-BatchNorm2d-ReLU after features.27"], "before the pooling that ends the stage"


def test_share_none_is_whole_peer_networks() -> None:
    torch.manual_seed(0)
    peer = networks.Tokens()
    cohort = Cohort(networks.Tiny(), example(), [Branch(), Branch(network=peer)], taps=("embeddings", "feature_maps"))
    out = cohort.eval()(example())
    assert cohort.costs[1].own_params == cohort.costs[0].params and cohort.costs[2].own_params > 0
    assert not any(isinstance(m, Replay) for m in cohort.modules())
    assert [e.shape[1] for e in out.embeddings] == [32, 32, 16]
    assert out.feature_maps[2].shape == (2, 16, 17, 1)
    assert (out.logits[0] - out.logits[1]).abs().max() > 1e-3


def test_a_trial_leaves_the_random_numbers_of_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.Generator(), torch.Generator()]  # none is here: of a GPU's generator only where it is kept differs
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)

    def drawn() -> list[float]:
        own = [torch.rand((), generator=gpu).item() for gpu in gpus]
        return [*own, torch.rand(()).item(), random.random(), np.random.rand()]

    network, state = networks.Tiny(), random_state()
    expected = drawn()
    set_random_state(state)
    with unchanged(network):
        assert drawn() == expected
    assert drawn() == expected and drawn() != expected


def test_fresh_networks_keep_the_makers_own_scheme() -> None:
    def make() -> nn.Module:
        network = networks.Tiny()
        nn.init.orthogonal_(network.head.weight)
        return network

    cohort = Cohort(make(), example(), [Branch("early", (1,))], fresh=make)
    weight = cohort.branches[0].head.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(4))
    assert not torch.equal(weight, cohort.target.head.weight)


def test_a_maker_of_another_network_is_refused() -> None:
    for other, key in ((networks.Tiny(7), "head.weight"), (nn.Sequential(networks.Tiny()), "stem.0.weight")):
        with pytest.raises(NetworkError, match=rf"`fresh` makes another network than the target, Tiny: {key} is"):
            Cohort(networks.Tiny(), example(), [Branch("early")], fresh=lambda made=other: made)


def test_pretrained_branches_stay_near_and_differ() -> None:
    torch.manual_seed(0)
    cohort = Cohort(networks.Tiny(), example(), [Branch("early"), Branch("early")], pretrained=True)
    own, first, second = (m.late[0].weight for m in cohort.members)
    assert 0.05 < (own - first).std() / own.std() < 0.2
    assert (first - second).abs().max() > 0


def test_a_copy_of_a_cohort_has_its_own_tape() -> None:
    cohort = Cohort(networks.Tiny(), example(), [Branch("early")], taps=("embeddings",)).eval()
    twin = copy.deepcopy(cohort)
    with torch.no_grad():
        before = cohort(example())
        for parameter in twin.target.stem.parameters():
            parameter.mul_(2)
        assert not torch.equal(twin(example()).logits[1], before.logits[1])
        assert torch.equal(cohort(example()).logits[1], before.logits[1])
        lonely = copy.deepcopy(cohort.target)  # what a moving average of the weights copies
        lonely(example())
    assert not cohort.tape.outputs and not twin.tape.outputs
    twin.strip()
    assert any(m._forward_hooks for m in cohort.target.modules())


@pytest.mark.parametrize("kind", [networks.Tiny, networks.Tokens])
def test_a_copy_of_a_member_alone_has_nothing_of_the_cohort(kind: type[nn.Module]) -> None:
    target = kind()
    seen: list[int] = []
    handle = target.head.register_forward_hook(lambda m, args, output: seen.append(1))  # the user's own stays
    as_it_came = {name: set(vars(module)) for name, module in target.named_modules()}
    branches = [Branch("early" if kind is networks.Tiny else "blocks.3")] * 2
    cohort = Cohort(target, example(), branches, taps=("embeddings", "feature_maps")).eval()

    def hooks(network: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())

    lonely = copy.deepcopy(cohort.target)
    part, holder = copy.deepcopy(cohort.target.head), copy.deepcopy(nn.ModuleList([cohort.target]))
    assert hooks(cohort.target) > 3 and hooks(lonely) == hooks(part) == hooks(holder) == 1
    assert {name: set(vars(module)) for name, module in lonely.named_modules()} == as_it_came
    seen.clear()
    assert torch.equal(lonely(example()), cohort(example()).logits[0]) and len(seen) == 4
    twin = copy.deepcopy(cohort)
    again = copy.deepcopy(twin)  # a copy of a copy is as good
    assert list(again.state_dict()) == list(twin.state_dict()) == list(cohort.state_dict())
    assert sum(isinstance(m, Replay) for m in again.modules()) == sum(isinstance(m, Replay) for m in cohort.modules())
    assert hooks(again.target) == hooks(cohort.target) and hooks(copy.deepcopy(again.target)) == 1
    said, expected = again(example()), cohort(example())
    assert all(map(torch.equal, (*said.logits, *said.embeddings), (*expected.logits, *expected.embeddings)))
    handle.remove()
    assert cohort.strip() is target and hooks(target) == 0
    assert {name: set(vars(module)) for name, module in target.named_modules()} == as_it_came


def test_the_cohort_compiles_to_one_graph() -> None:
    target = timm.create_model("resnet18", num_classes=4)
    images = example(64)
    cohort = Cohort(target, images, [Branch("layer2", (1, 1)), Branch("layer2", (2, 1))], taps=("feature_maps",)).eval()
    compiled = torch.compile(cohort, fullgraph=True, backend="aot_eager")  # a graph break raises
    with torch.no_grad():
        for mine, theirs in zip(compiled(images).logits, cohort(images).logits, strict=True):
            torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize("pool", ["map", "avg", "avgmax", "token"])
def test_every_pooling_of_tokens_leaves_the_blocks_to_grow(pool: str) -> None:
    target = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=48, num_classes=4, global_pool=pool
    )
    anatomy = inspect(target, example())
    assert anatomy.cut() == "blocks.2" and anatomy.embedding == 48
    cohort = Cohort(target, example(), [Branch("blocks.2", (1,))], taps=("embeddings", "feature_maps"))
    assert cohort.grown == ["1 x Block after blocks.3"]
    sum(z.sum() for z in cohort.train()(example()).logits).backward()
    assert all(p.grad is not None for p in cohort.parameters())
