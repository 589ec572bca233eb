"""Recipes: read strictly, every mistake at once, changed by flags and --set, written in full, never running code."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
import yaml

from okdc import recipe
from okdc.errors import OkdcError, RecipeError
from okdc.recipe import Recipe


def settings_of(name: str) -> inspect.Signature:
    """Two methods as okdc.methods.settings would describe them."""
    if name == "warm":

        def takes(*, temperature: float = 3.0, kind: Literal["a", "b"] = "a", steps: int | None = None) -> None: ...
    elif name == "needy":

        def takes(*, teacher: str) -> None: ...  # type: ignore[misc]
    else:
        raise RecipeError(f"there is no method {name!r}. Did you mean warm?")
    return inspect.signature(takes, eval_str=True)


def mistakes(raw: object, method_settings: recipe.MethodSettings | None = None) -> str:
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(raw, method_settings)
    return str(error.value)


# --- reading --------------------------------------------------------------------------------------------------------


def test_an_empty_recipe_is_the_defaults_and_types_are_exact() -> None:
    assert Recipe.from_dict({}) == Recipe()
    assert Recipe.from_dict({"train": None}) == Recipe()  # a section with nothing below it
    read = Recipe.from_dict({"train": {"lr": 1, "decay_milestones": [3], "amp": None}, "cohort": {"peers": ["a", "b"]}})
    assert read.train.lr == 1.0 and type(read.train.lr) is float
    assert read.train.decay_milestones == [3] and read.train.amp is None and read.cohort.peers == ["a", "b"]


def test_all_mistakes_of_a_recipe_are_reported_at_once() -> None:
    said = mistakes(
        {
            "trian": {},
            "network": {"model": 3, "pretrained": 1, "img_size": 0},
            "cohort": {"share": "trunks", "lr": 0.1},
            "method": {"name": "warm", "temprature": 1, "kind": "c", "steps": 1.5},
            "data": {"scale": [0.5], "ratio": [1, "x"]},
            "train": {"epohcs": 3, "epochs": 0, "lr": "fast", "batch_size": True},
        },
        settings_of,
    )
    expected = [
        "recipe has 15 mistakes:",
        "trian: no such section. Did you mean train?",
        "network.model: expected text, got 3 (whole number)",
        "network.pretrained: expected true or false, got 1 (whole number)",
        "network.img_size: expected at least 1, got 0",
        "cohort.share: expected one of trunk, none, got 'trunks'",
        "cohort.lr: no such setting. It belongs to train.",
        "method.temprature: warm has no such setting. Did you mean temperature?",
        "method.kind: expected one of a, b, got 'c'",
        "method.steps: expected a whole number or null, got 1.5 (number)",
        "data.scale: expected 2 values, got 1",
        "data.ratio: element 2: expected a number, got 'x' (text)",
        "train.epohcs: no such setting. Did you mean epochs",
        "train.epochs: expected at least 1, got 0",
        "train.lr: expected a number or null, got 'fast' (text)",
        "train.batch_size: expected a whole number, got True (true or false)",
    ]
    assert [words for words in expected if words not in said] == []
    assert len(said.splitlines()) == len(expected)


@pytest.mark.parametrize("raw", [None, [], "train", {"train": 3}, {"method": "ahbf"}, {"train": {"lr": float("nan")}}])
def test_shapes_that_are_no_recipe(raw: object) -> None:
    assert "expected" in mistakes(raw)


def test_a_method_is_bound_to_its_signature() -> None:
    read = Recipe.from_dict({"method": {"name": "warm", "temperature": 4}}, settings_of)
    assert read.method == {"name": "warm", "temperature": 4.0, "kind": "a", "steps": None}
    assert "teacher: needy needs it" in mistakes({"method": {"name": "needy"}}, settings_of)
    assert "Did you mean warm" in mistakes({"method": {"name": "wram"}, "train": {"epochs": 0}}, settings_of)
    assert "expected the name of a method" in mistakes({"method": {"name": 3}}, settings_of)


def test_yaml_reads_numbers_as_people_write_them_and_refuses_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("train:\n  lr: 1e-3\n  weight_decay: 5E-4\n  epochs: 7\n")
    read = recipe.load(file)
    assert (read.train.lr, read.train.weight_decay, read.train.epochs) == (1e-3, 5e-4, 7)
    for text, words in [
        ("train: {epochs: 1}\ntrain: {epochs: 2}\n", "train is given twice"),
        ("train: [\n", "not plain YAML"),
        ("- train\n", "expected the sections"),
        ("", "expected the sections"),
    ]:
        file.write_text(text)
        with pytest.raises(RecipeError, match=words):
            recipe.load(file)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / "evil.yaml"
    file.write_text(
        f"train: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]\n"
    )
    with pytest.raises(RecipeError, match="not plain YAML"):
        recipe.load(file)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text, flag",
    [
        ("network: {model: 'os:system', model_kwargs: {command: ls}}", "model"),
        ("cohort: {peers: [resnet18, 'my.nets:build']}", "peers"),
        ("cohort: {teacher: 'my.nets:trained'}", "teacher"),
        ("method: {name: 'my.methods:Mine'}", "method"),
    ],
)
def test_a_recipe_names_code_only_if_the_user_typed_it(tmp_path: Path, text: str, flag: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=f"must not run.*--{flag} ") as error:
        recipe.load(file)
    name = str(error.value).rpartition(f"--{flag} ")[2].rstrip(".")
    assert recipe.load(file, typed=[name]) == recipe.load(file, typed=None)
    with pytest.raises(RecipeError, match="must not run"):
        recipe.resolve(file)
    typed = {flag: [name] if flag == "peers" else name}
    assert recipe.resolve(file, flat=typed)
    places = {"model": "network.model", "peers": "cohort.peers", "teacher": "cohort.teacher", "method": "method.name"}
    key = places[flag]
    assert recipe.resolve(file, sets=[f"{key}={typed[flag]}"])


@pytest.mark.parametrize(
    "name", ["resnet18", "hf-hub:a/b", "hf_hub:a", "local-dir:x", "torchvision/vgg11", "C:net", "a/b:c"]
)
def test_names_that_run_no_code(name: str) -> None:
    assert not recipe.runs_code(name)


# --- shipped recipes ------------------------------------------------------------------------------------------------


def test_every_shipped_recipe_loads_and_says_what_it_is() -> None:
    from okdc import methods

    assert set(recipe.names()) >= {
        "cifar100/resnet32-ahbf",
        "cifar100/resnet32-baseline",
        "cifar100/resnet32-dml",
        "digits/resnet18-ahbf",
        "imagenet/resnet18-ahbf",
    }
    used = set()
    for name in recipe.names():
        read = recipe.load(name, methods.settings)
        header = recipe.path(name).read_text().split("\n\n")[0]
        assert all(line.startswith("#") for line in header.splitlines()), name
        assert [word for word in ("# From:", "# Command: okdc compress", "# Expected:") if word not in header] == [], (
            name
        )
        assert name.endswith(read.method["name"]), name
        used.add(read.method["name"])
    assert used == set(methods.names())


def test_a_recipe_is_found_by_name_and_by_path() -> None:
    by_name = recipe.load("cifar100/resnet32-ahbf")
    assert by_name == recipe.load(recipe.path("cifar100/resnet32-ahbf")) == recipe.load("cifar100/resnet32-ahbf.yaml")
    with pytest.raises(RecipeError, match="Did you mean cifar100/resnet32-ahbf"):
        recipe.load("cifar100/resnet32-abhf")


# --- changing -------------------------------------------------------------------------------------------------------


def test_bare_names_belong_to_one_section_only() -> None:
    kinds = [kind for kind in get_type_hints(Recipe).values() if is_dataclass(kind)]
    names = [field.name for kind in kinds for field in fields(kind)]
    assert len(kinds) == 5 and len(names) == len(set(names)) == len(recipe.flat_settings())
    assert not {"method", "method_kwargs", "recipe", "sets", "output", "experiment", "resume"} & set(names)


def test_override_routes_bare_names_to_their_sections() -> None:
    changed = recipe.override(Recipe(), {"epochs": 3, "members": 4, "onnx": False, "method_kwargs": {"x": 1}})
    assert (changed.train.epochs, changed.cohort.members, changed.export.onnx) == (3, 4, False)
    assert changed.method == {"name": "ahbf", "x": 1} and Recipe().method == {"name": "ahbf"}
    with pytest.raises(RecipeError, match=r"epoch: no such setting. Did you mean epochs"):
        recipe.override(Recipe(), {"epoch": 3})
    with pytest.raises(RecipeError, match=r"train.epochs: expected a whole number, got '3'"):
        recipe.override(Recipe(), {"epochs": "3"})


def test_another_method_starts_from_its_own_defaults() -> None:
    start = Recipe.from_dict({"method": {"name": "warm", "temperature": 9}}, settings_of)
    assert recipe.override(start, {"method": "warm"}, settings_of).method["temperature"] == 9
    assert recipe.override(start, {"method": "needy", "method_kwargs": {"teacher": "t"}}, settings_of).method == {
        "name": "needy",
        "teacher": "t",
    }


def test_members_that_share_nothing_take_nothing_that_a_recipe_says_of_shared_layers() -> None:
    said = {"members": 3, "extra_blocks": 2, "cut": "layer2", "trunk_gradient": "mean"}
    start = Recipe.from_dict({"cohort": said, "method": {"name": "warm"}}, settings_of)
    alone = recipe.override(start, {"share": "none"}, settings_of).cohort
    assert (alone.members, alone.extra_blocks, alone.cut, alone.trunk_gradient) == (3, 2, None, None)
    peers = recipe.override(start, {"peers": ["resnet34"]}, settings_of).cohort
    assert (peers.members, peers.extra_blocks, peers.cut, peers.trunk_gradient) == (None, None, None, None)
    typed = recipe.override(start, {"share": "none", "trunk_gradient": "sum"}, settings_of).cohort
    assert typed.trunk_gradient == "sum", "which is refused where members are built"


def test_sets_change_plain_values() -> None:
    raw = {"train": {"epochs": 1}, "method": {"name": "warm", "temperature": 9}}
    changed = recipe.apply_sets(
        raw,
        ["train.epochs=60", "train.lr=1e-3", "data.mean=[0.5, 0.5]", "network.cut=", "network.model_kwargs.depth=2"],
    )
    assert changed == {
        "train": {"epochs": 60, "lr": 1e-3},
        "method": {"name": "warm", "temperature": 9},
        "data": {"mean": [0.5, 0.5]},
        "network": {"cut": None, "model_kwargs": {"depth": 2}},
    }
    assert raw["train"] == {"epochs": 1}
    assert recipe.apply_sets(raw, ["method.name=other"])["method"] == {"name": "other"}
    for wrong in ("train.epochs", "epochs=3", "train.=3", "train.epochs.x=1", "train.lr=["):
        with pytest.raises(RecipeError, match="--set"):
            recipe.apply_sets(raw, [wrong])


def test_resolve_lets_the_later_word_win() -> None:
    embedded = recipe.resolve()
    assert embedded == recipe.load(recipe.DEFAULT)
    assert recipe.resolve(flat={"epochs": 2}).network == embedded.network  # still the embedded default
    assert recipe.resolve(flat={"data": "/images"}).network == Recipe().network  # own data: the general defaults
    assert recipe.resolve(sets=["data.data=/images"]).train == Recipe().train
    won = recipe.resolve(
        "cifar100/resnet32-ahbf", sets=["train.epochs=5", "train.lr=0.2"], flat={"epochs": 6, "amp": None}
    )
    assert (won.train.epochs, won.train.lr, won.train.sched) == (6, 0.2, "multistep")
    switched = recipe.resolve("cifar100/resnet32-ahbf", sets=["method.temperature=2"], flat={"method": "warm"},
                              method_settings=settings_of)  # fmt: skip
    assert switched.method == {"name": "warm", "temperature": 2.0, "kind": "a", "steps": None}


# --- writing --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_complete_and_reads_back_the_same() -> None:
    for name in recipe.names():
        read = recipe.load(name)
        again = Recipe.from_dict(yaml.safe_load(read.to_yaml()))
        assert again == read and again.to_yaml() == read.to_yaml() and again.digest == read.digest
        assert yaml.safe_load(read.to_yaml())["train"].keys() == asdict(Recipe())["train"].keys()
    assert len({recipe.load(name).digest for name in recipe.names()}) == len(recipe.names())


def test_recipes_need_no_torch() -> None:
    code = "import sys; from okdc import recipe; recipe.load(recipe.DEFAULT); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_mistakes_are_okdc_errors_of_wrong_use() -> None:
    assert issubclass(RecipeError, OkdcError) and RecipeError.exit_code == 2
