"""What a task is for the rest of okdc: found by its name, served by methods that say so, and the only one to know."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import okdc
from okdc import methods, tasks
from okdc.errors import NetworkError, RecipeError
from okdc.losses import kl, soft_cross_entropy
from okdc.networks import refuse_unsteady
from okdc.pipeline.compression import compress
from okdc.tasks.shared.scorer import Scorer
from okdc.tasks.shared.tally import Tally
from okdc.tasks.task import Task
from tests.helpers.networks import Tiny

PACKAGE = Path(okdc.__file__).parent
KNOWING = r"argmax|cross_entropy|\bkl\b|softmax|top-?[15]\b|Acc@|confusion|balanced accuracy|recall"
# What may mention what a class is, and why.
ALLOWED = {
    "report/classes.py": "a part of the report, of what classify remembers for it",
    "report/report.py": "puts that part where it belongs",
    "report/report.html.j2": "the same",
    "report/report.md.j2": "the same",
    "training/state.py": "the field of checkpoints that are out there has that name",
    "training/loop.py": "the same field",
    "training/restoring.py": "the old name of a column of histories that are out there",
    "pipeline/compression.py": "the same field",
    "pipeline/facts.py": "the same field",
    "verification/schema.py": "lists the scores of all tasks",
    "recipe/sections.py": "help that lists the metrics of all tasks",
    "data/batchwise.py": "the first of several crops that fit",
    "data/own_preprocess.py": "the channel that is furthest off",
}


def test_nobody_else_knows_what_a_class_is() -> None:
    own = (PACKAGE / "tasks", PACKAGE / "methods", PACKAGE / "losses.py")
    files = [file for file in PACKAGE.rglob("*") if file.suffix in (".py", ".j2") and "__pycache__" not in file.parts]
    others = [file for file in files if not any(file.is_relative_to(place) for place in own)]
    assert len(others) > 150
    knowing = {
        file.relative_to(PACKAGE).as_posix()
        for file in others
        if re.search(KNOWING, file.read_text(encoding="utf-8"), re.IGNORECASE)
    }
    assert knowing == set(ALLOWED)


@pytest.mark.parametrize("name", tasks.names())
def test_a_task_is_whole(name: str) -> None:
    task = tasks.get(name)
    assert task.name == name and task.metric in task.metrics and set(task.scores) <= set(task.metrics)
    assert task.metric in task.scores  # what gates count in
    inherited = [each for each in vars(Task) if getattr(type(task), each) is getattr(Task, each)]
    missing = [each for each in inherited if "raise NotImplementedError" in _source(Task, each)]
    assert not missing
    for made, base in ((task.scorer(3), Scorer), (task.tally(), Tally)):
        assert not [each for each in vars(base) if "raise NotImplementedError" in _source(type(made), each)]
    assert tasks.of(task.facts()).name == name  # a bundle says what it is
    assert any(name in methods.get(each).tasks for each in methods.names())


def _source(kind: type, name: str) -> str:
    found = getattr(kind, name)
    made = name.startswith("__") or not inspect.isfunction(found)  # by dataclass
    return "" if made else inspect.getsource(found)


def test_names_of_tasks_are_checked() -> None:
    with pytest.raises(RecipeError, match=r"no task 'multilabels'. Did you mean multilabel"):
        tasks.get("multilabels")


@pytest.mark.parametrize("method", [name for name in methods.names() if methods.get(name).tasks == ("classify",)])
def test_methods_for_classes_refuse_several_labels(method: str) -> None:
    with pytest.raises(RecipeError, match=rf"{method} is no method for --task multilabel.*Those for multilabel: afd"):
        compress("resnet20_cifar", task="multilabel", method=method)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"task": "multilabel", "mixup": 0.2}, "--mixup is not for --task multilabel: it makes images"),
        ({"task": "multilabel", "class_weights": "auto"}, "--class-weights is not for --task multilabel.*--pos-weight"),
        ({"pos_weight": "auto"}, "--pos-weight is not for --task classify.*--class-weights"),
        ({"task": "multilabel", "eval_metric": "top1"}, "multilabel has no such metric; expected map"),
        ({"eval_metric": "map"}, "classify has no such metric; expected top1 or top5 or balanced"),
        ({"task": "pose2"}, "there is no task 'pose2'"),
    ],
)
def test_settings_of_another_task_are_refused(settings: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        compress("resnet20_cifar", method="baseline", **settings)


def test_maps_are_no_distributions_over_classes() -> None:
    maps = torch.randn(2, 5, 8, 8)
    for distance in (kl, soft_cross_entropy):
        with pytest.raises(RecipeError, match=r"gives \(2, 5, 8, 8\); expected logits"):
            distance(maps, maps)


def test_a_network_that_gives_probabilities_of_labels_is_refused() -> None:
    network = torch.nn.Sequential(Tiny(), torch.nn.Sigmoid())
    refuse_unsteady(network, (3, 32, 32))
    with pytest.raises(NetworkError, match=r"ends in a sigmoid.*torch.nn.Identity\(\) in place of '1'"):
        refuse_unsteady(network, (3, 32, 32), tasks.get("multilabel"))
