"""The step on trial: it warns of what an author may not have meant, and leaves nothing behind."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import okdc
from okdc import methods, recipe
from okdc.cohort import Cohort, CohortOutput
from okdc.errors import MethodError
from okdc.losses import cross_entropy
from okdc.methods import Method
from okdc.pipeline.assemble_cohort import build_method
from tests.helpers.networks import Tiny
from tests.methods.test_mistakes import IMAGES, Hidden, author, both, gives


class Centred(Method):
    """A tensor and a number that a run that goes on would not have."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(cohort)
        self.centre, self.seen = torch.zeros(4), 0

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        self.seen += 1
        self.centre.lerp_(out.logits[0].detach().mean(0), 0.5)
        return both(out, labels)


class Saved(Centred):
    def get_extra_state(self) -> dict[str, Any]:
        return {"centre": self.centre, "seen": self.seen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.centre, self.seen = state["centre"], state["seen"]


class Grows(Method):
    """A mutable default, too."""

    losses = gives(lambda out, y: both(out, y)).losses

    def __init__(self, cohort: Cohort, *, seen: list[int] = [1]) -> None:  # noqa: B006
        super().__init__(cohort)
        self.seen = seen

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append(1)
        return super().forward(images, labels)


class Following(Method):
    """All that a step changes besides weights is changed after it."""

    losses = author().losses
    inside: dict[str, Any] | None = None

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(cohort)
        self.mean = copy.deepcopy(cohort.target).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))
        self.counts, self.seen = {"steps": 0}, 0
        if self.inside is not None:
            self.further = self.inside

    def before_step(self) -> None:
        assert self.cohort.target.head.weight.grad is not None

    @torch.no_grad()
    def after_step(self, batches: Any) -> None:
        for mean, new in zip(self.mean.parameters(), self.cohort.target.parameters(), strict=True):
            assert new.grad is None
            mean.lerp_(new + 1, 0.5)
        self.cohort.target.head.weight.mul_(2)
        self.steps += len(next(batches)[1])
        self.counts["steps"] += 1
        self.seen += 1


WARNED: dict[str, tuple[type[Method], list[str]]] = {
    "nothing wrong": (author(), []),
    "a sum instead of a mean": (
        gives(lambda out, y: both(out, y) | {"map": 1e6 * out.logits[0].square().sum()}),
        [r"the loss 'map' is [\d,]{7,} for 4 images of noise.*cross-entropy of 4 classes is about 1.4. Take means"],
    ),
    "a loss without a gradient": (
        gives(lambda out, y: both(out, y) | {"agreement": (out.logits[0] - out.logits[1]).detach().square().mean()}),
        ["the loss 'agreement' has no gradient, so nothing learns from it"],
    ),
    "a member that nothing trains": (
        gives(lambda out, y: {"ce": cross_entropy(out.logits[0], y)}),
        ["no loss reaches peer1, so nothing trains it"],
    ),
    "plain tensors and numbers": (
        Centred, ["self.centre holds a tensor that is no buffer", "self.seen went from 0 to 1 in a step"],
    ),
    "those with a state of their own": (Saved, []),
    "a list that grows": (Grows, [r"self.seen went from \[1\] to \[1, 1\] in a step, and no checkpoint has it"]),
    "names that okdc does not look at": (
        author(tap=("embeddings",), on_epoch_start=lambda self: None, views=2, heads=3),
        ["Mine.on_epoch_start is nothing .* mean begin_epoch", "Mine.tap is .* mean taps", "Mine.views .* mean needs"],
    ),
    "what after_step counts": (Following, ["self.seen went from 0 to 1 in a step, and no checkpoint has it"]),
    "what could not be put back is not tried": (type("Mine", (Following,), {"inside": {"other": object()}}), []),
    "a teacher in a list": (type("Mine", (Hidden,), {"frozen": True}), []),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WARNED)
def test_what_could_be_meant_is_said(mistake: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, words = WARNED[mistake]
    network = Tiny()
    network.head.weight.grad = torch.ones_like(network.head.weight)
    okdc.build(network, IMAGES, kind, share="none")
    assert network.head.weight.grad.eq(1).all() and network.head.bias.grad is None
    assert len(caplog.messages) == len(words), caplog.messages
    for said, expected in zip(caplog.messages, words, strict=True):
        assert re.search(expected, said), said


def picks(out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
    return {"ce": -out.logits[0].log_softmax(1).gather(1, labels[:, None]).mean() + 0 * out.logits[1].sum()}


def test_losses_that_need_classes_are_refused_where_labels_are_probabilities(caplog: pytest.LogCaptureFixture) -> None:
    mine = gives(picks)
    okdc.build(Tiny(), IMAGES, mine, share="none")
    with pytest.raises(MethodError, match=r"losses of Mine cannot use labels that are probabilities: .*--mixup"):
        okdc.build(Tiny(), IMAGES, mine, share="none", soft_labels=True)
    with pytest.raises(MethodError, match="ZeroDivisionError"):  # labels are not to blame
        okdc.build(Tiny(), IMAGES, gives(lambda out, y: 1 / 0), share="none", soft_labels=True)
    mixed = recipe.Recipe(
        method={"name": methods.name_of(mine)},
        cohort=recipe.CohortSettings(share="none"),
        data=recipe.DataSettings(mixup=0.2),
    )
    with pytest.raises(MethodError, match="cannot use labels"):  # as a run with mixup would build it
        build_method(Tiny(), mixed, (3, 16, 16), 4, named=False)
    compared = gives(lambda out, y: both(out, y) | {"same": out.logits[0].mean() * (y == y[:1]).sum()})
    assert not caplog.messages
    okdc.build(Tiny(), IMAGES, compared, share="none", soft_labels=True)
    assert "'same' is" in caplog.text and "of the same as probabilities" in caplog.text


def test_the_step_on_trial_leaves_nothing_behind() -> None:
    kind = type("Mine", (Centred,), {"listed": None})
    torch.manual_seed(0)
    method = okdc.build(Tiny(), IMAGES, kind, share="none")
    drawn = torch.rand(3)
    assert method.seen == 0 and torch.equal(method.centre, torch.zeros(4))  # type: ignore[comparison-overlap]
    assert all(p.grad is None for p in method.parameters())
    assert all(b.eq(0).all() for name, b in method.named_buffers() if name.endswith("num_batches_tracked"))
    torch.manual_seed(0)
    untried = Tiny()
    plan = kind.plan(okdc.inspect(untried, IMAGES), share="none")
    by_hand = kind(Cohort(untried, IMAGES, plan))
    assert torch.equal(torch.rand(3), drawn)
    for mine, theirs in zip(method.state_dict().values(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_follows_a_step_is_tried_and_undone() -> None:
    network = Tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    method = okdc.build(network, IMAGES, Following, share="none")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in method.mean.state_dict().items())
    assert (method.steps, method.counts, method.seen) == (0, {"steps": 0}, 0)
    assert all(p.grad is None for p in method.parameters())
