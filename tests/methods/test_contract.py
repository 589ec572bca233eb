"""What every method must do, from the file listing: a new method is under all of this with no test written."""

from __future__ import annotations

import copy
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import nn

from okdc import methods, recipe
from okdc.anatomy import inspect
from okdc.cohort import Cohort
from okdc.methods import Method
from tests.helpers.networks import Depthwise, Tiny, Tokens

NAMES = methods.names()
CLASSIFYING = [name for name in NAMES if "classify" in methods.get(name).tasks]  # others: tests/tasks/test_pose.py
HERE = Path(__file__).parent
NETWORKS = {"convolutional": Tiny, "depthwise": Depthwise, "tokens": Tokens}
LABELS = torch.arange(64) % 4  # of a training set, for methods that remember its images


def build(name: str, network: type[nn.Module] = Tiny) -> Method:
    torch.manual_seed(0)
    kind = methods.get(name)
    return around(network(), kind, members=min(kind.members, 3), extra_blocks=min(kind.extra_blocks, 1))


def around(target: nn.Module, kind: type[Method], **plan: int) -> Method:
    """A method with its cohort around `target`, given all that its class declares that it needs."""
    images = torch.randn(2, 3, 32, 32)
    branches = kind.plan(inspect(target, images), **plan)
    cohort = Cohort(target, images, branches, taps=kind.taps, trunk_gradient=kind.trunk_gradient)
    given = {"teacher": Tokens()} if kind.needs_teacher else {}
    if "train_labels" in signature(kind.__init__).parameters:
        given["train_labels"] = LABELS
    return kind(cohort, **given)


def batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 4


def asked(method: Method) -> tuple[torch.Tensor, ...]:
    """A batch as the method asks for it: with views, with indices."""
    (images, labels), needs = batch(), type(method).needs()
    if needs.views:
        images = torch.stack([images + 0.1 * i for i in range(len(method.cohort))])
    return (images, labels, torch.arange(len(labels))) if needs.indices else (images, labels)


def step(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    torch.manual_seed(3)
    method.lr.fill_(0.05)
    parts = method.train()(*asked(method))
    optimizer.zero_grad()
    sum(parts.values()).backward()
    optimizer.step()
    method.after_step([asked(method)])
    return {name: value.item() for name, value in parts.items()}


def sgd(method: Method) -> torch.optim.Optimizer:
    return torch.optim.SGD(method.param_groups(0.05), lr=0.05, momentum=0.9)


def test_every_method_is_tested_and_every_test_and_recipe_is_of_one() -> None:
    assert len(NAMES) >= 16 and set(NAMES) >= {"ahbf", "baseline", "dml", "kd", "lmcl", "oemc", "pcl", "sokd"}
    assert {file.stem.removeprefix("test_") for file in HERE.glob("test_*.py")} - {"contract"} == set(NAMES)
    assert {recipe.load(name, methods.settings).method["name"] for name in recipe.names()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_has_a_recipe_and_a_test(name: str) -> None:
    assert (HERE / f"test_{name}.py").is_file(), f"tests/methods/test_{name}.py is missing"
    of_it = [known for known in recipe.names() if known.endswith(f"-{name}")]
    assert of_it, f"recipes/DATASET/NETWORK-{name}.yaml is missing"


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_complete(name: str) -> None:
    card = methods.card(name)
    assert card.splitlines()[0].endswith(".") and len(card.splitlines()[0]) <= 120
    for section in ("Paper:", "Code:", "Differs:", "Costs:"):
        assert f"\n{section} " in card, section
    assert card.split("\n\n")[1].startswith("Use it when ")


def test_a_method_of_ones_own_need_not_have_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = "import okdc\nclass Bare(okdc.Method): pass\n"
    told = f'{bare}class Told(okdc.Method):\n    """\n    All learn.\n\n    Slowly.\n    """\n'
    (tmp_path / "without_words.py").write_text(told)
    (tmp_path / "with_words.py").write_text(f'"""Everything of it."""\n{told}')
    monkeypatch.syspath_prepend(tmp_path)
    assert methods.card("without_words:Told") == "All learn.\n\nSlowly."
    assert methods.card("without_words:Bare") == "Bare has no docstring."
    assert methods.card("with_words:Told") == "Everything of it."


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CLASSIFYING)
def test_everything_learns(name: str, network: str) -> None:
    method = build(name, NETWORKS[network])
    method.epochs.fill_(2), method.epoch.fill_(1)
    learns = {key: p for key, p in method.named_parameters() if p.requires_grad}
    before = {key: p.detach().clone() for key, p in method.named_parameters()}
    optimizer = sgd(method)
    for _ in range(3):
        parts = step(method, optimizer)
        assert parts and all(torch.isfinite(torch.tensor(list(parts.values()))))
    still = [key for key, p in learns.items() if torch.equal(p, before[key])]
    # A bias in front of a batch norm is cancelled by it: the gradient is rounding alone, and may be nothing.
    assert [key for key in still if not key.endswith(".bias")] == []
    assert [key for key, p in method.named_parameters() if (p.grad is None) == (key in learns)] == []


@pytest.mark.parametrize("name", CLASSIFYING)
def test_members_disagree_at_birth(name: str) -> None:
    method = build(name).eval()
    logits = method.cohort(batch()[0]).logits
    for i, mine in enumerate(logits):
        assert all((mine - other).abs().max() > 1e-4 for other in logits[:i])
    assert method.ensemble(method.cohort(batch()[0])).shape == logits[0].shape


@pytest.mark.parametrize("name", CLASSIFYING)
def test_labels_may_be_probabilities(name: str) -> None:
    method = build(name).eval()
    images, labels, *indices = asked(method)
    torch.manual_seed(0)  # a method may draw
    hard = method(images, labels, *indices)
    torch.manual_seed(0)
    soft = method(images, nn.functional.one_hot(labels, 4).float(), *indices)
    for key in hard:
        torch.testing.assert_close(hard[key], soft[key])


@pytest.mark.parametrize("name", CLASSIFYING)
def test_the_student_is_the_users_own_object(name: str) -> None:
    torch.manual_seed(0)
    target = Tiny()
    keys, flags = list(target.state_dict()), [getattr(m, "inplace", None) for m in target.modules()]
    method = around(target, methods.get(name))
    step(method, sgd(method))
    inside = method.eval().cohort(batch()[0]).logits[0]
    student = method.strip()
    assert student is target and type(student) is Tiny and list(student.state_dict()) == keys
    assert [getattr(m, "inplace", None) for m in student.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in student.modules())
    assert torch.equal(student(batch()[0]), inside)


@pytest.mark.parametrize("name", CLASSIFYING)
def test_same_seed_same_numbers_and_exact_resume(name: str) -> None:
    straight, again = build(name), build(name)
    first, second = sgd(straight), sgd(again)
    losses = [step(straight, first) for _ in range(4)]
    assert [step(again, second) for _ in range(2)] == losses[:2]
    saved = copy.deepcopy((again.state_dict(), second.state_dict()))
    resumed = build(name)
    for parameter in resumed.parameters():
        parameter.data.zero_()  # nothing but what was saved may matter
    optimizer = sgd(resumed)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert [step(resumed, optimizer) for _ in range(2)] == losses[2:]
    for mine, theirs in zip(resumed.state_dict().values(), straight.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", CLASSIFYING)
def test_losses_are_full_precision_under_autocast(name: str) -> None:
    method = build(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        parts = method(*asked(method))
    assert {value.dtype for value in parts.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["afd", "ahbf", "mcl_okd", "pcl"])  # maps, a chain, memories, views and averages
def test_the_whole_cohort_compiles_to_one_graph(name: str) -> None:
    method = build(name).train()
    compiled = torch.compile(copy.deepcopy(method), fullgraph=True, backend="aot_eager")  # a graph break raises
    torch.manual_seed(5)
    expected = method(*asked(method))
    torch.manual_seed(5)
    found = compiled(*asked(method))
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, rtol=1e-3, atol=1e-4)
