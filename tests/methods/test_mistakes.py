"""What an author of a method gets wrong is said in a sentence, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import okdc
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.errors import CutError, MethodError, OkdcError
from okdc.losses import cross_entropy
from okdc.methods import Method
from okdc.needs import Needs
from tests.helpers.networks import Tiny

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def cohort(*taps: str) -> Cohort:
    return Cohort(Tiny(), IMAGES, [Branch("early")], taps=taps)


# --- what is looked at ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"taps": "embeddings"}, r"taps is the string 'embeddings'; expected a tuple.*taps = \('embeddings',\)"),
        ({"taps": ("embedding",)}, r"taps has 'embedding'. Did you mean embeddings"),
        ({"taps": ("feature_map",)}, "taps has 'feature_map'. Did you mean feature_maps"),
        ({"share": "trunks"}, "share is 'trunks'; expected 'trunk' or 'none'. Did you mean trunk"),
        ({"trunk_gradient": "average"}, "trunk_gradient is 'average'; expected 'sum' or 'mean'"),
        ({"members": "3"}, "members is '3'; expected a whole number"),
        ({"members": 0}, "members is 0; expected a whole number of 1 or more"),
        ({"needs": lambda self: Needs()}, "needs is a function; expected a class method"),
        ({"needs": Needs(views=True)}, "needs is a Needs; expected a class method"),
        ({"tasks": "classify"}, r"tasks is the string 'classify'; expected a tuple"),
    ],
)
def test_a_class_that_declares_what_there_is_not_is_refused_where_it_is_written(declared: dict, words: str) -> None:
    with pytest.raises(MethodError, match=f"^Wrong: {words}"):
        type("Wrong", (Method,), declared)


@pytest.mark.parametrize(("taps", "words"), [("shared", "the string 'shared'"), (["stages"], "taps has 'stages'")])
def test_a_cohort_made_by_hand_knows_its_taps(taps: object, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        Cohort(Tiny(), IMAGES, [Branch("early")], taps=taps)  # type: ignore[arg-type]


USES: dict[str, Callable[[CohortOutput], object]] = {
    "stage_maps": lambda out: out.stage_maps[0],
    "feature_maps": lambda out: [x.mean() for x in out.feature_maps],
    "embeddings": lambda out: len(out.embeddings),
    "shared": lambda out: F.relu(out.shared),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", USES)
def test_what_is_not_tapped_says_so_when_it_is_looked_at(name: str) -> None:
    others = [other for other in USES if other != name]
    untapped, tapped = cohort(*others)(IMAGES), cohort(name)(IMAGES)
    assert USES[name](tapped) is not None
    with pytest.raises(CutError, match=rf'out.{name} is looked at, and not tapped. Say taps = \("{name}",\)'):
        USES[name](untapped)
    if name == "shared":
        with pytest.raises(CutError, match="With a view for each member there is none"):
            untapped.shared.mean()  # type: ignore[union-attr]


def test_a_cohort_that_was_stripped_says_so() -> None:
    stripped = cohort("embeddings")
    student = stripped.strip()
    with pytest.raises(CutError, match=r"this cohort was stripped.*Run the network that strip\(\) gave"):
        stripped(IMAGES)
    assert isinstance(student(IMAGES), Tensor)


# --- what the losses are ----------------------------------------------------------------------------------------------


def author(**members: Any) -> type[Method]:
    """A class with these members, whose losses are right where nothing else is said."""
    return type("Mine", (Method,), {"losses": lambda self, out, labels: both(out, labels)} | members)


def both(out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
    return {f"ce/{i}": cross_entropy(z, labels) for i, z in enumerate(out.logits)}


def gives(losses: Callable[[CohortOutput, Tensor], Any]) -> type[Method]:
    return author(losses=lambda self, out, labels: losses(out, labels))


class Begun(Method):
    """It assigns a module before anything else is there."""

    losses = author().losses

    def __init__(self, cohort: Cohort) -> None:
        self.head = nn.Linear(4, 4)


class Unbegun(Begun):
    def __init__(self, cohort: Cohort) -> None:
        self.temperature = 3.0


class Asks(Method):
    losses = author().losses

    def __init__(self, cohort: Cohort, margin: float) -> None:
        super().__init__(cohort)


class Groups(Method):
    losses = author().losses

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": self.cohort.branches.parameters(), "lr": lr}]


class Hidden(Method):
    losses = author().losses
    frozen = False

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(cohort)
        self.heads = [nn.Linear(4, 4).requires_grad_(not self.frozen) for _ in cohort.names]


REFUSED: dict[str, tuple[type[Method], str]] = {
    "not a dict": (gives(lambda out, y: F.cross_entropy(out.logits[0], y)), "losses of Mine are a Tensor"),
    "nothing": (gives(lambda out, y: None), "the losses of Mine are a NoneType; expected a dictionary"),
    "empty": (gives(lambda out, y: {}), "the losses of Mine are an empty dictionary; expected a dictionary"),
    "no scalar": (
        gives(lambda out, y: {"ce": F.cross_entropy(out.logits[0], y, reduction="none")}),
        r"the loss 'ce' of Mine has the shape \(4,\); expected a scalar: take its .mean\(\)",
    ),
    "a float": (gives(lambda out, y: {"ce": out.logits[0].sum().item()}), r"'ce' of Mine is a float.*item\(\)"),
    "no gradient": (gives(lambda out, y: {"ce": out.logits[0].detach().sum()}), r"no loss of Mine has a gradient"),
    "a number for a name": (gives(lambda out, y: {0: out.logits[0].sum()}), "Mine calls a loss 0; expected a string"),
    "a setting without a default": (Asks, r"Asks cannot be made without margin: .*-kwargs margin=VALUE"),
    "no losses": (type("Mine", (Method,), {}), "Mine has no losses: write `def losses"),
    "no super().__init__ before a module": (Begun, r"__init__ of Begun does not call super\(\).__init__\(cohort\)"),
    "no super().__init__ at all": (Unbegun, r"__init__ of Unbegun does not call super\(\).__init__\(cohort\)"),
    "the student in no loss": (
        gives(lambda out, y: {"ce/1": cross_entropy(out.logits[1], y)}),
        r"no loss of Mine \(ce/1\) reaches the target, out.logits\[0\], which ships",
    ),
    "the student's loss detached": (
        gives(lambda out, y: both(out, y) | {"ce/0": cross_entropy(out.logits[0].detach(), y)}),
        "reaches the target.*leave out .detach",
    ),
    "param_groups without the target": (Groups, "param_groups of Groups has no parameter of the target"),
    "an after_step that fails": (
        author(after_step=lambda self, batches: next(batches).mean()),
        r"after_step of Mine fails in a first step, in line \d+ of test_mistakes.py: AttributeError: .*read once",
    ),
    "an after_step without batches": (
        author(after_step=lambda self: None), r"after_step of Mine fails in a first step: TypeError: .*read once",
    ),
    "a before_step that fails": (
        author(before_step=lambda self: self.cohort.target.head.weight.grad.missing()),
        "before_step of Mine fails in a first step, in line .*when a step has its gradients",
    ),
    "modules in a plain list": (Hidden, r"self.heads of Hidden is a plain list with a Linear that learns.*ModuleList"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_meant_is_refused_and_the_network_left_alone(mistake: str) -> None:
    kind, words = REFUSED[mistake]
    network = Tiny()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(MethodError, match=words):
        okdc.build(network, IMAGES, kind, share="none")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


class Remembering(Method):
    """Keeps what the target said, with its graph."""

    members = 1

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(cohort)
        self.register_buffer("past", torch.zeros(4, 4))

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        self.past = 0.9 * self.past + 0.1 * out.logits[0]
        return {"ce": cross_entropy(out.logits[0], labels)}


class Unindexed(Method):
    """Asks for indices, and does not take them."""

    members = 1

    @classmethod
    def needs(cls, **settings: Any) -> Needs:
        return Needs(indices=True)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"ce": cross_entropy(self.cohort(images).logits[0], labels)}


class Misspelt(Method):
    """Looks for what an output does not have."""

    members = 1

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        return {"ce": cross_entropy(out.logit[0], labels)}  # type: ignore[attr-defined]


class AllLabels(Misspelt):
    """Wants the labels of all images."""

    def __init__(self, cohort: Cohort, train_labels: Tensor) -> None:
        super().__init__(cohort)


class MisspeltLabels(Misspelt):
    """Calls the labels of all images something else."""

    def __init__(self, cohort: Cohort, training_labels: Tensor) -> None:
        super().__init__(cohort)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Remembering, r"the buffer 'past' of Remembering holds a graph after a step.*\.detach\(\) what fills it"),
        (
            Unindexed,
            r"forward of Unindexed fails.*given\. By what needs.*images \(4, 3, 16, 16\).*indices \(4,\)\. "
            r"So write forward\(self, images, labels, indices\)\.",
        ),
        (Misspelt, r"losses of Misspelt fails in a first step, in line \d+ of test_mistakes.py: AttributeError.*logit"),
        (AllLabels, r"needs the labels of all training images.*train_labels=LABELS"),
        (MisspeltLabels, r"cannot be made without training_labels.*in __init__\. Did you mean train_labels\?"),
    ],
)  # fmt: skip
def test_what_fails_in_a_step_is_told_with_the_authors_line(kind: type[Method], words: str) -> None:
    with pytest.raises(OkdcError, match=words):
        okdc.build(Tiny(), IMAGES, kind)
