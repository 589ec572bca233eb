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

from okdc import methods, recipe
from okdc.anatomy import anatomy as found
from okdc.anatomy import inspect
from okdc.anatomy.modes import unchanged
from okdc.cohort import Branch, Cohort
from okdc.cohort.replay import Record, Replay
from okdc.errors import CutError, NetworkError
from okdc.pipeline import assemble_cohort
from okdc.system.randomness import random_state, set_random_state
from tests.helpers import networks

TRAPS = [
    networks.ControlFlow,
    networks.ChangesInPlace,
    networks.CalledTwice,
    networks.Tuples,
    networks.Lists,
    networks.Counting,
    networks.ReadsAttribute,
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


def example(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def build(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    if name == "torchvision/vit_b_16":
        return torchvision.models.VisionTransformer(32, 8, 6, 2, 32, 64, num_classes=10)
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.removeprefix("torchvision/"), num_classes=10)
    import okdc.networks  # noqa: F401 (registers the CIFAR networks)

    small = {"mlp_ratio": 0.02} if name == "vgg11_bn" else {}
    return timm.create_model(name, num_classes=10, **small)


def with_weights_of_target(cohort: Cohort) -> Cohort:
    """The same cohort with every branch's weights set equal to the target's."""
    own = cohort.target.state_dict()
    for branch in cohort.branches:
        branch.load_state_dict({k: v for k, v in own.items() if k in branch.state_dict()})
    return cohort


@pytest.mark.parametrize("kind", TRAPS, ids=lambda kind: kind.__name__)
def test_traps_are_shared_exactly(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    cuts = [c.name for c in inspect(kind(), example()).cuts]
    assert len(cuts) > 3
    for cut in cuts:  # construction proves equal logits in evaluation and in training mode, or raises
        cohort = with_weights_of_target(Cohort(kind(), example(), [Branch(cut), Branch(cut)]))
        out = cohort.eval()(example())
        assert torch.equal(out.logits[0], out.logits[1]) and torch.equal(out.logits[0], out.logits[2]), cut


def test_gradients_of_a_shared_trunk_are_those_of_unshared_copies() -> None:
    torch.manual_seed(0)
    target = networks.ChangesInPlace().double()
    alone = copy.deepcopy(target)
    images = example().double()
    cohort = with_weights_of_target(Cohort(target, images, [Branch("early"), Branch("early")]))
    sum(z.square().sum() for z in cohort.eval()(images).logits).backward()
    (3 * alone.eval()(images).square().sum()).backward()
    for mine, theirs in zip(cohort.target.stem.parameters(), alone.stem.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


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


def test_views_are_refused_where_the_trunk_takes_a_mean_gradient() -> None:
    cohort = Cohort(networks.Tiny(), example(), [Branch("early")], trunk_gradient="mean")
    with pytest.raises(CutError, match=r"images \(2, 2, 3, 32, 32\).*trunk_gradient='sum'"):
        cohort(torch.stack([example(), example()]))
    assert len(cohort(example()).logits) == 2


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


def test_the_trunk_runs_once() -> None:
    cohort = Cohort(networks.Tiny(), example(), [Branch("early"), Branch("early")])
    tracked = int(cohort.target.stem[1].num_batches_tracked)
    cohort.train()(example())
    assert int(cohort.target.stem[1].num_batches_tracked) == tracked + 1
    assert cohort.costs[1].flops < 0.5 * cohort.costs[0].flops


def test_the_cohort_compiles_to_one_graph() -> None:
    target = timm.create_model("resnet18", num_classes=4)
    images = example(64)
    cohort = Cohort(target, images, [Branch("layer2", (1, 1)), Branch("layer2", (2, 1))], taps=("feature_maps",)).eval()
    compiled = torch.compile(cohort, fullgraph=True, backend="aot_eager")  # a graph break raises
    with torch.no_grad():
        for mine, theirs in zip(compiled(images).logits, cohort(images).logits, strict=True):
            torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


def test_refusals_say_what_to_type_and_leave_the_target_alone() -> None:
    target = networks.Tiny()
    with pytest.raises(NetworkError, match=r"cannot be cut after 'erly'. Did you mean early"):
        Cohort(target, example(), [Branch("erly")])

    class Moody(networks.Tiny):
        """What the tail does depends on how often the network has run."""

        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Moody.runs += 1
            return super().forward(x) * Moody.runs

    moody = Moody()
    with pytest.raises(CutError, match=r"cannot be shared up to 'early'.*--cut.*--share none"):
        Cohort(moody, example(), [Branch("early")])
    assert not any(m._forward_hooks for m in [*target.modules(), *moody.modules()])
    with pytest.raises(NetworkError, match="returned a tuple of 2"):
        Cohort(networks.TwoOutputs(), example())
    with pytest.raises(NetworkError, match=r"the target, MoreInTraining, returns a tuple of 2 .* in training mode"):
        Cohort(networks.MoreInTraining(), example(), [Branch()])
    with pytest.raises(NetworkError, match=r"cannot run on images \(2, 1, 32, 32\)"):
        inspect(target, torch.randn(2, 1, 32, 32))


def test_what_the_branches_share_can_be_looked_at() -> None:
    torch.manual_seed(0)
    for kind, cut, shape in [
        (networks.Tiny, "early", (2, 16, 16, 16)),
        (networks.ChangesInPlace, "early", (2, 16, 16, 16)),
        (networks.Tokens, "blocks.3", (2, 16, 17, 1)),
    ]:
        target = kind().eval()
        seen: list[torch.Tensor] = []
        handle = target.get_submodule(cut).register_forward_hook(lambda m, a, y, seen=seen: seen.append(y.clone()))
        cohort = Cohort(target, example(), [Branch(cut), Branch(cut)], taps=("shared",))
        shared = cohort(example()).shared
        handle.remove()
        assert shared is not None and shared.shape == shape and cohort.shared_width == 16
        expected = seen[-1].transpose(1, 2).unsqueeze(-1) if kind is networks.Tokens else seen[-1]
        assert torch.equal(shared, expected)
        untapped = Cohort(kind(), example(), [Branch(cut)]).eval()(example()).shared
        with pytest.raises(CutError, match=r"out.shared is looked at, and not tapped.*taps = \(\"shared\",\)"):
            torch.relu(untapped)
    with pytest.raises(CutError, match=r"nothing is shared.*--share none"):
        Cohort(networks.Tiny(), example(), [Branch()], taps=("shared",))
    with pytest.raises(CutError, match=r"'pair' gives no single tensor.*--cut"):
        Cohort(networks.Tuples(), example(), [Branch("pair")], taps=("shared",))


@pytest.mark.parametrize("kind", [networks.Tiny, networks.ChangesInPlace, networks.Tokens])
def test_the_trunk_may_get_the_mean_of_the_gradients(kind: type[nn.Module]) -> None:
    """Exactly a third of the sum in the trunk, exactly the same in the tails, and the same logits."""
    cut = "blocks.3" if kind is networks.Tokens else "early"
    grads, logits = {}, {}
    for how in ("sum", "mean"):
        torch.manual_seed(0)
        cohort = Cohort(kind().double(), example().double(), [Branch(cut)] * 2, trunk_gradient=how).eval()  # type: ignore[arg-type]
        logits[how] = torch.stack(copy.deepcopy(cohort)(example().double()).logits)
        logits[how].square().sum().backward()
        logits[how] = torch.stack(cohort(example().double()).logits)
        logits[how].square().sum().backward()
        grads[how] = {name: p.grad for name, p in cohort.named_parameters()}
        student = cohort.strip()
        assert not any(m._forward_hooks for m in student.modules())
    assert torch.equal(logits["sum"], logits["mean"])
    trunk = {n for n in grads["sum"] if not torch.equal(grads["sum"][n], grads["mean"][n])}
    tail = ("target.late", "target.head", "target.norm", "target.blocks.4", "target.blocks.5", "branches")
    assert trunk == {n for n in grads["sum"] if not n.startswith(tail)}
    for name in trunk:
        torch.testing.assert_close(3 * grads["mean"][name], grads["sum"][name], rtol=1e-12, atol=1e-12)


def test_the_mean_of_gradients_is_refused_where_more_than_the_cut_crosses() -> None:
    with pytest.raises(CutError, match=r"'early.1'.*needs one way into the trunk, and stem are others.*--cut"):
        Cohort(WithSkip(), example(), [Branch("early.1")], trunk_gradient="mean")
    Cohort(WithSkip(), example(), [Branch("stem")], trunk_gradient="mean")


class WithSkip(networks.Tiny):
    """Its classifier also sees the stem."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.stem(x)
        late = self.late(self.early(stem)).mean((2, 3))
        return self.head(late + stem.mean((2, 3)).repeat(1, 4))


def test_a_divided_trunk_compiles_to_one_graph() -> None:
    images = example(64)
    target = timm.create_model("resnet18", num_classes=4)
    cohort = Cohort(target, images, [Branch("layer2")], taps=("shared",), trunk_gradient="mean").eval()
    compiled = torch.compile(cohort, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (cohort, compiled):
        cohort.zero_grad()
        out = run(images)
        (sum(z.square().sum() for z in out.logits) + out.shared.sum()).backward()
        grads.append(target.conv1.weight.grad.clone())
    torch.testing.assert_close(*grads)
    torch._dynamo.reset()


def test_a_tree_with_three_cuts_divides_at_each_of_them_once() -> None:
    torch.manual_seed(0)
    target = timm.create_model("resnet10t", num_classes=4)
    images = torch.randn(4, 3, 32, 32)
    plan = methods.get("clilr").plan(inspect(target, images), members=8, cut="layer1,layer2,layer3")
    cohort = Cohort(target, images[:2], plan, trunk_gradient="mean").train()
    for module in cohort.modules():
        assert sum(isinstance(hook, Record) for hook in module._forward_hooks.values()) <= 1


@pytest.mark.parametrize(
    "kind, cut, words",
    [
        (networks.Growing, "early", "in evaluation mode 'head' is the first that differs"),
        (networks.ByData, "early", "which modules run depends on the images: 'dark.0' for some, 'bright.0' for others"),
        (networks.OtherOrder, "one", "called in another order, so that 'two.0' of a branch would not learn"),
        (networks.CalledMoreInTraining, "one", "called in another order, so that 'two.0' of a branch would not learn"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_was_seen(kind: type[nn.Module], cut: str, words: str) -> None:
    torch.manual_seed(0)
    target = kind()
    with pytest.raises(
        CutError, match=rf"{kind.__name__} cannot be shared up to '{cut}': .*{words}.*--cut.*--share none"
    ):
        Cohort(target, torch.randn(4, 3, 32, 32), [Branch(cut)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.modules())


def test_modules_that_serve_on_both_sides_or_not_in_training_are_shared_exactly() -> None:
    for kind, cut in (
        (networks.SharedAcross, "middle"),
        (networks.OtherOrder, "two"),
        (networks.SkippedInTraining, "one"),
    ):
        torch.manual_seed(0)
        cohort = with_weights_of_target(Cohort(kind(), example(), [Branch(cut)]))
        for training in (True, False):
            out = copy.deepcopy(cohort).train(training)(example())
            assert torch.equal(out.logits[0], out.logits[1]), (kind, training)


def test_modules_left_out_at_random() -> None:
    torch.manual_seed(0)
    with pytest.raises(CutError, match=r"'one' is called in some passes and not in others.*--cut.*--share none"):
        Cohort(networks.LeftOut("trunk"), example(), [Branch("one")])
    with pytest.raises(CutError, match=r"'two' of LeftOut.* not called in every pass.*--method dml"):
        Cohort(networks.LeftOut("tail"), example(), [Branch("early")], taps=("feature_maps",))
    for where, cut in (("tail", "early"), ("trunk", "stem")):
        cohort = Cohort(networks.LeftOut(where), example(), [Branch(cut)], taps=("embeddings",)).train()
        for _ in range(4):
            sum(z.sum() for z in cohort(example()).logits).backward()


def test_what_the_proof_could_not_see_is_said_when_it_happens() -> None:
    class Rare(networks.Tiny):
        rare = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            early = self.early(self.stem(x))
            again = self.rare and not isinstance(self.early, nn.Sequential)  # in a branch
            return self.head(self.late(early if not again else self.early(self.stem(x))).mean((2, 3)))

    cohort = Cohort(Rare(), example(), [Branch("early")], taps=("feature_maps",))
    Rare.rare = True
    with pytest.raises(CutError, match=r"calls 'stem', and in this pass the target has not again.*--share none"):
        cohort(example())
    del cohort.target.late._forward_hooks[max(cohort.target.late._forward_hooks)]
    Rare.rare = False
    with pytest.raises(CutError, match=r"feature map's module of the target.*--method dml"):
        cohort(example())


def test_a_copy_that_runs_the_targets_own_modules_is_refused() -> None:
    class Stored(networks.Tiny):
        def __init__(self) -> None:
            super().__init__()
            late = self.late
            self.run = lambda x: late(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.run(self.early(self.stem(x))).mean((2, 3)))

    patched = networks.Tiny()
    forward = patched.forward
    patched.forward = lambda x: forward(2 * x)  # type: ignore[method-assign]
    for target, name in ((Stored(), "late"), (patched, "stem")):
        for branch in (Branch("early", (1,)), Branch()):
            with pytest.raises(NetworkError, match=rf"a copy of .* runs '{name}' of .*class Mine\("):
                Cohort(target, example(), [branch])
        assert not any(m._forward_hooks for m in target.modules())


def test_a_frozen_tail_cannot_be_a_branch() -> None:
    target = networks.Tiny()
    target.late.requires_grad_(False), target.head.requires_grad_(False)
    with pytest.raises(CutError, match=r"nothing after the cut is trainable; unfreeze.*--cut.*--share none"):
        Cohort(target, example(), [Branch("early")])
    Cohort(target, example(), [Branch("stem")])


def test_networks_without_a_feature_map_or_classifier_have_peers() -> None:
    class NoClassifier(networks.Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.late(self.early(self.stem(x))).mean((2, 3)) @ self.head.weight.T

    vectors = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, 4))
    for target, missing in ((vectors, "feature map"), (NoClassifier(), "final Linear")):
        for name in ("baseline", "dml"):
            wanted = recipe.Recipe(method={"name": name})
            method = assemble_cohort.build_method(target, wanted, (3, 32, 32), 4, named=False)
            assert all(z.shape == (2, 4) for z in method.cohort(example()).logits)
        for name in ("ahbf", "afd"):
            with pytest.raises(NetworkError, match=rf"no {missing}.*--method dml, --share none"):
                assemble_cohort.build_method(target, recipe.Recipe(method={"name": name}), (3, 32, 32), 4, named=False)


@pytest.mark.parametrize("method", ["ffl", "dml", "lmcl"])
def test_a_run_inspects_each_network_once(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    watched: list[nn.Module] = []
    watch = found.watch
    monkeypatch.setattr(found, "watch", lambda network, images: (watched.append(network), watch(network, images))[1])
    target = networks.Depthwise()
    built = assemble_cohort.build_method(target, recipe.Recipe(method={"name": method}), (3, 32, 32), 4, named=False)
    assert target in watched
    assert all(watched.count(network) == 1 for network in watched)
    assert built.cohort.anatomy == inspect(target, example())
    built.strip()


def test_an_anatomy_that_is_given_is_taken_if_it_is_of_this_target() -> None:
    target, images = networks.Tiny(), example()
    anatomy = inspect(target, images)
    cohort = Cohort(target, images, [Branch("early")], anatomy=anatomy)
    assert cohort.anatomy is anatomy
    cohort.strip()
    others = inspect(networks.Tiny(width=4), images), inspect(target, example(64)), inspect(networks.Tokens(), images)
    for other in others:
        with pytest.raises(NetworkError, match=r"the anatomy is that of .* the target is Tiny on images \(3, 32, 32"):
            Cohort(target, images, [Branch("early")], anatomy=other)
    assert not any(module._forward_hooks for module in target.modules())


def test_what_only_decides_is_carried_too() -> None:
    torch.manual_seed(0)
    cohort = with_weights_of_target(Cohort(networks.ScaledByData(), example(), [Branch("early")])).eval()
    for images in (example(), 10 * example()):
        out = cohort(images)
        assert torch.equal(out.logits[0], out.logits[1])


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
