"""What every method must do, from the file listing: a new method is under all of this with no test written."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from okdc import methods, recipe, testing
from okdc.methods import Method
from okdc.testing import Case
from tests.helpers.networks import Depthwise, Tiny, Tokens

NAMES = methods.names()
CLASSIFYING = [name for name in NAMES if "classify" in methods.get(name).tasks]  # others: tests/tasks/test_pose.py
HERE = Path(__file__).parent
NETWORKS = {"convolutional": Tiny, "depthwise": Depthwise, "tokens": Tokens}


def case(name: str, network: type[nn.Module] = Tiny) -> Case:
    """At most three members, which are enough to go wrong."""
    kind = methods.get(name)
    wishes = {"members": min(kind.members, 3), "extra_blocks": min(kind.extra_blocks, 1)}
    return Case(kind, network, wishes=wishes, teacher=Tokens)


def build(name: str) -> Method:
    return case(name).build()


def asked(method: Method) -> tuple[torch.Tensor, ...]:
    """A batch as the method asks for it: with views, with indices."""
    return Case(type(method)).batch(method)


def test_every_method_is_tested_and_every_test_and_recipe_is_of_one() -> None:
    assert len(NAMES) >= 16 and set(NAMES) >= {"ahbf", "baseline", "dml", "kd", "lmcl", "oemc", "pcl", "sokd"}
    tested = {file.stem.removeprefix("test_").removesuffix("_golden") for file in HERE.glob("test_*.py")}
    assert tested - {"contract", "mistakes", "naming", "trial"} == set(NAMES)
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
    assert methods.card("with_words:Told") == "All learn.\n\nSlowly."  # a file of two methods
    assert methods.card("with_words:Bare") == "Everything of it."


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", CLASSIFYING)
def test_everything_learns(name: str, network: str) -> None:
    testing.learns(case(name, NETWORKS[network]))


@pytest.mark.parametrize("demand", [demand for demand in testing.DEMANDS if demand != "everything learns"])
@pytest.mark.parametrize("name", CLASSIFYING)
def test_a_method_does_what_every_method_has_to(name: str, demand: str) -> None:
    whole = replace(case(name), wishes={}) if testing.DEMANDS[demand] is testing.student else case(name)
    testing.DEMANDS[demand](whole)


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
