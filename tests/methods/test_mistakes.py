"""What an author of a method gets wrong is said in a sentence, before the first step."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import okdc
from okdc import methods, recipe
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.errors import CutError, MethodError, OkdcError, RecipeError
from okdc.losses import cross_entropy
from okdc.methods import Method
from okdc.methods.shared.parts import ramp
from okdc.needs import Needs
from okdc.pipeline.assemble_cohort import build_method
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


# --- how it is named --------------------------------------------------------------------------------------------------

TWO = """
import okdc
from okdc.losses import cross_entropy


class First(okdc.Method):
    \"\"\"The first.\"\"\"

    def losses(self, out, labels):
        return {"ce": cross_entropy(out.logits[0], labels)}


class Second(First):
    pass
"""


def test_a_method_is_found_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two_of_mine.py").write_text(TWO)
    (tmp_path / "one_of_mine.py").write_text("import two_of_mine\nclass Only(two_of_mine.First): pass\n")
    first = methods.get("./two_of_mine.py:First")
    assert first.__name__ == "First" and first is methods.get(f"{tmp_path}/two_of_mine.py:First")
    assert first is methods.get("two_of_mine:First") and methods.get("one_of_mine.py").__name__ == "Only"
    assert methods.card("two_of_mine.py:First") == "The first."
    assert methods.card("two_of_mine.py:Second") == "Second has no docstring."
    wrong = {
        "./two_of_mine.py": r"two_of_mine.py has 2 methods, First and Second. Say which one: ./two_of_mine.py:First",
        "two_of_mine.py:Frist": "two_of_mine.py has no Frist. Did you mean First",
        "two_of_mine:Third": "It has First, Second",
        "three.py:First": "there is no file three.py",
        "two_of_mine": "there is no method 'two_of_mine'.*path/to/file.py:Class",
        "two_of_mine:okdc": "is not a method: expected a subclass",
    }
    for name, words in wrong.items():
        with pytest.raises(RecipeError, match=words):
            methods.get(name)
    (tmp_path / "json.py").write_text(TWO)
    with pytest.raises(RecipeError, match=r"another module is called json .*Rename the file"):
        methods.get("json.py:First")


def test_a_recipe_must_not_run_a_file_that_nobody_typed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("method: {name: ./theirs.py:Method}")
    with pytest.raises(RecipeError, match=r"Python code that a recipe must not run.*--method ./theirs.py:Method"):
        recipe.load(tmp_path / "recipe.yaml")


def test_a_method_is_given_as_its_class(tmp_path: Path) -> None:
    name = methods.name_of(Begun)
    assert name == f"{__name__}:Begun" and methods.get(name) is Begun and methods.name_of("dml") == "dml"
    assert methods.name_of(methods.get("one")) == "one"
    local = author()
    assert methods.get(methods.name_of(local)) is local
    with pytest.raises(RecipeError, match=r"expected a name, a file.py:Class, or a subclass of okdc.Method"):
        methods.name_of(Tiny)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="__init__ of Begun does not call"):  # so it went all the way
        okdc.compress("resnet20_cifar", [(IMAGES, torch.arange(2))], method=Begun, output=tmp_path, num_classes=2)


def test_settings_and_wishes_of_a_method_built_by_hand_are_checked() -> None:
    built = okdc.build(Tiny(), IMAGES, "kd", teacher=Tiny(), temperature=2.0)
    assert built.temperature == 2.0
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ("one", {"temprature": 2.0}, "One has no setting 'temprature'. Did you mean temperature"),
        ("kd", {}, "Kd needs a trained network: give teacher=NETWORK"),
        ("dml", {"teacher": Tiny()}, "Dml takes no teacher"),
        ("dml", {"cut": "early"}, "--cut has no effect here"),
        ("dml", {"task": "segment"}, "there is no task 'segment'"),
        ("dml", {"members": 1}, "needs two members or more"),
    ]
    for method, given, words in wrong:
        with pytest.raises(RecipeError, match=words):
            okdc.build(Tiny(), IMAGES, method, **given)


def test_an_epoch_begins_by_a_call() -> None:
    method = okdc.build(Tiny(), IMAGES, "one", members=2)
    early, late = [], []
    for epoch, found in ((0, early), (29, late)):
        method.begin_epoch(epoch, 30)
        found.append(ramp(method, None).item())
    assert early[0] < 0.01 and late[0] == 1 and (method.epoch.item(), method.epochs.item()) == (29, 30)
