"""The trunk runs once, can be looked at, and gets the sum or the mean of the gradients."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from okdc import methods
from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort
from okdc.cohort.replay import Record
from okdc.errors import CutError
from tests.helpers import networks, traps
from tests.helpers.cohorts import example, with_weights_of_target


def test_gradients_of_a_shared_trunk_are_those_of_unshared_copies() -> None:
    torch.manual_seed(0)
    target = traps.ChangesInPlace().double()
    alone = copy.deepcopy(target)
    images = example().double()
    cohort = with_weights_of_target(Cohort(target, images, [Branch("early"), Branch("early")]))
    sum(z.square().sum() for z in cohort.eval()(images).logits).backward()
    (3 * alone.eval()(images).square().sum()).backward()
    for mine, theirs in zip(cohort.target.stem.parameters(), alone.stem.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_views_are_refused_where_the_trunk_takes_a_mean_gradient() -> None:
    cohort = Cohort(networks.Tiny(), example(), [Branch("early")], trunk_gradient="mean")
    with pytest.raises(CutError, match=r"images \(2, 2, 3, 32, 32\).*trunk_gradient='sum'"):
        cohort(torch.stack([example(), example()]))
    assert len(cohort(example()).logits) == 2


def test_the_trunk_runs_once() -> None:
    cohort = Cohort(networks.Tiny(), example(), [Branch("early"), Branch("early")])
    tracked = int(cohort.target.stem[1].num_batches_tracked)
    cohort.train()(example())
    assert int(cohort.target.stem[1].num_batches_tracked) == tracked + 1
    assert cohort.costs[1].flops < 0.5 * cohort.costs[0].flops


def test_what_the_branches_share_can_be_looked_at() -> None:
    torch.manual_seed(0)
    for kind, cut, shape in [
        (networks.Tiny, "early", (2, 16, 16, 16)),
        (traps.ChangesInPlace, "early", (2, 16, 16, 16)),
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
        Cohort(traps.Tuples(), example(), [Branch("pair")], taps=("shared",))


@pytest.mark.parametrize("kind", [networks.Tiny, traps.ChangesInPlace, networks.Tokens])
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
