"""A method of one's own, named by its file, given as its class, or built by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import okdc
from okdc import methods, recipe
from okdc.cohort import Cohort
from okdc.errors import MethodError, RecipeError
from okdc.methods import Method
from okdc.methods.shared.parts import ramp
from tests.helpers.networks import Tiny
from tests.methods.test_mistakes import IMAGES, author

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


class Begun(Method):
    """Found by its name, and refused when it is made."""

    losses = author().losses

    def __init__(self, cohort: Cohort) -> None:
        self.head = nn.Linear(4, 4)


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
        (
            "clilr",
            {"variant": "half"},
            "Clilr: variant was 'half'; expected one of paper, paper_t2, half_kl, ramped_kl",
        ),
        ("kd", {}, "Kd needs a trained network: give teacher=NETWORK"),
        ("dml", {"teacher": Tiny()}, "Dml takes no teacher"),
        ("dml", {"cut": "early"}, "--cut has no effect here"),
        ("dml", {"trunk_gradient": "mean"}, "--trunk-gradient has no effect here"),
        ("dml", {"task": "segment"}, "there is no task 'segment'"),
        ("dml", {"members": 1}, "needs two members or more"),
    ]
    for method, given, words in wrong:
        with pytest.raises(RecipeError, match=words):
            okdc.build(Tiny(), IMAGES, method, **given)


def test_shared_layers_get_the_mean_of_the_gradients_where_a_user_says_so() -> None:
    found = {}
    for how in (None, "sum", "mean"):
        torch.manual_seed(0)
        built = okdc.build(Tiny(), IMAGES, "clilr", members=3, trunk_gradient=how).double()
        sum(built(IMAGES.double(), torch.arange(len(IMAGES))).values()).backward()
        found[how] = next(built.cohort.target.stem.parameters()).grad
    assert torch.equal(found[None], found["mean"]), "what the method says"
    torch.testing.assert_close(3 * found["mean"], found["sum"])


def test_an_epoch_begins_by_a_call() -> None:
    method = okdc.build(Tiny(), IMAGES, "one", members=2)
    early, late = [], []
    for epoch, found in ((0, early), (29, late)):
        method.begin_epoch(epoch, 30)
        found.append(ramp(method, None).item())
    assert early[0] < 0.01 and late[0] == 1 and (method.epoch.item(), method.epochs.item()) == (29, 30)
