"""What is proved of a shared trunk before training, and what cannot be shared is refused with what was seen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from okdc import recipe
from okdc.anatomy import anatomy as found
from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort
from okdc.errors import CutError, NetworkError
from okdc.pipeline import assemble_cohort
from tests.helpers import networks, traps
from tests.helpers.cohorts import example, with_weights_of_target


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


@pytest.mark.parametrize(
    "kind, cut, words",
    [
        (traps.Growing, "early", "in evaluation mode 'head' is the first that differs"),
        (traps.ByData, "early", "which modules run depends on the images: 'dark.0' for some, 'bright.0' for others"),
        (traps.OtherOrder, "one", "called in another order, so that 'two.0' of a branch would not learn"),
        (traps.CalledMoreInTraining, "one", "called in another order, so that 'two.0' of a branch would not learn"),
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
        (traps.SharedAcross, "middle"),
        (traps.OtherOrder, "two"),
        (traps.SkippedInTraining, "one"),
    ):
        torch.manual_seed(0)
        cohort = with_weights_of_target(Cohort(kind(), example(), [Branch(cut)]))
        for training in (True, False):
            out = copy.deepcopy(cohort).train(training)(example())
            assert torch.equal(out.logits[0], out.logits[1]), (kind, training)


def test_modules_left_out_at_random() -> None:
    torch.manual_seed(0)
    with pytest.raises(CutError, match=r"'one' is called in some passes and not in others.*--cut.*--share none"):
        Cohort(traps.LeftOut("trunk"), example(), [Branch("one")])
    with pytest.raises(CutError, match=r"'two' of LeftOut.* not called in every pass.*--method dml"):
        Cohort(traps.LeftOut("tail"), example(), [Branch("early")], taps=("feature_maps",))
    for where, cut in (("tail", "early"), ("trunk", "stem")):
        cohort = Cohort(traps.LeftOut(where), example(), [Branch(cut)], taps=("embeddings",)).train()
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
    cohort = with_weights_of_target(Cohort(traps.ScaledByData(), example(), [Branch("early")])).eval()
    for images in (example(), 10 * example()):
        out = cohort(images)
        assert torch.equal(out.logits[0], out.logits[1])
