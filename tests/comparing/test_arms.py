"""Which runs a comparison is made of: one for each method, plain training, and controls with as much compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from okdc import methods
from okdc.comparing import arms
from okdc.comparing.comparison import _recipe
from okdc.errors import CutError, RecipeError
from okdc.measure.estimate import Estimate, estimate
from okdc.recipe import Recipe, override

SETTINGS: dict[str, Any] = {
    "model": "resnet20_cifar",
    "img_size": 32,
    "num_classes": 10,
    "data": "digits",
    "epochs": 20,
}


def make(name: str, **further: Any) -> Recipe:
    return override(Recipe(), SETTINGS | further | {"method": name}, methods.settings)


def costing(flops: dict[str, float]) -> Any:
    """Says that a method runs so many times the target's FLOPs."""
    real = estimate(make("baseline"))

    def measure(recipe: Recipe) -> Estimate:
        return replace(real, flops=int(flops[recipe.method["name"]] * real.networks[0].flops))

    return measure


def test_plain_training_has_as_many_epochs_more_as_a_step_costs_more() -> None:
    planned = arms.plan(["one", "dml"], make, costing({"one": 1.64, "dml": 2.0}), True)
    assert [arm.name for arm in planned] == ["baseline", "one", "dml", "baseline-33-epochs", "baseline-40-epochs"]
    by_name = {arm.name: arm for arm in planned}
    assert by_name["one"].control == "baseline-33-epochs" and by_name["dml"].control == "baseline-40-epochs"
    assert by_name["one"].cost == pytest.approx(1.64) and by_name["baseline-40-epochs"].recipe.train.epochs == 40


def test_methods_that_cost_about_the_same_share_a_control_that_costs_no_less() -> None:
    planned = arms.plan(["one", "dml", "ffl"], make, costing({"one": 1.9, "dml": 2.0, "ffl": 1.02}), True)
    assert {arm.name: arm.control for arm in planned if arm.control} == {
        "one": "baseline-40-epochs", "dml": "baseline-40-epochs", "ffl": "baseline",
    }  # fmt: skip
    assert [arm.name for arm in arms.plan(["one"], make, costing({"one": 2.0}), False)] == ["baseline", "one"]
    dml = methods.get("dml")  # a class stands for its name
    assert [arm.name for arm in arms.plan([dml], make, costing({"dml": 2.0}), False)] == ["baseline", "dml"]


def test_a_teacher_costs_a_forward_pass_alone() -> None:
    recipe = make("kd", teacher="resnet20_cifar")
    assert arms._cost(estimate(recipe)) == pytest.approx(4 / 3, rel=1e-3)


def test_what_cannot_be_trained_is_a_line_with_its_reason() -> None:
    def measure(recipe: Recipe) -> Estimate:
        if recipe.method["name"] == "ahbf":
            raise CutError("no cut at all")
        return estimate(make("baseline"))

    planned = {arm.name: arm for arm in arms.plan(["one", "ahbf", "kd"], make, measure, True)}
    assert planned["ahbf"].problem == "no cut at all" and "--teacher" in (planned["kd"].problem or "")
    assert planned["one"].problem is None and planned["ahbf"].control is None
    with pytest.raises(RecipeError, match=r"none of the methods can be compared:\nahbf: no cut at all"):
        arms.plan(["ahbf"], make, measure, True)
    with pytest.raises(RecipeError, match=r"--methods: no method 'abhf'.*ahbf"):
        arms.plan(["abhf"], make, measure, True)


def test_what_builds_branches_is_not_for_plain_training() -> None:
    settings = {"data": "digits", "members": 2, "epochs": 4}
    plain, one = (_recipe("resnet20_cifar", None, None, (), settings, name) for name in ("baseline", "one"))
    assert plain.cohort.members is None and one.cohort.members == 2
    assert plain.train == one.train and not (plain.export.onnx or one.export.byproducts)
