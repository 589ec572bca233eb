"""The distances that --distance names, beside the papers' formulas written out image by image and class by class."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from okdc import methods, tasks
from okdc.errors import RecipeError
from okdc.losses import kl
from okdc.pipeline.assemble_cohort import build_method
from okdc.pipeline.compression import compress
from okdc.recipe import Recipe
from okdc.tasks.task import Task
from tests.helpers.networks import Tiny
from tests.methods.test_contract import asked, build

LABELS = torch.tensor([2, 0, 1, 1, 3])


def outputs() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    student, teacher = (3 * torch.randn(5, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


def compared_by(name: str, **weights: float) -> Task:
    task = tasks.get()
    task.compare_by(name, weights)
    return task


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def pearson(left: list[float], right: list[float]) -> float:
    n, mean_left, mean_right = len(left), sum(left) / len(left), sum(right) / len(right)
    both = sum((left[i] - mean_left) * (right[i] - mean_right) for i in range(n))
    return both / math.sqrt(sum((x - mean_left) ** 2 for x in left) * sum((x - mean_right) ** 2 for x in right))


def naive_standardized(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    total = 0.0
    for rows in zip(student, teacher, strict=True):
        soft = []
        for row in rows:
            mean = sum(row) / len(row)
            spread = math.sqrt(sum((z - mean) ** 2 for z in row) / len(row))
            soft.append(softmax([(z - mean) / spread for z in row], temperature))
        total += sum(p * math.log(p / q) for q, p in zip(*soft, strict=True))
    return temperature**2 * total / len(student)


def naive_dkd(student: list, teacher: list, temperature: float, alpha: float, beta: float) -> float:
    total = 0.0
    for label, s, t in zip(LABELS.tolist(), student, teacher, strict=True):
        q, p = softmax(s, temperature), softmax(t, temperature)
        own = p[label] * math.log(p[label] / q[label])
        tckd = own + (1 - p[label]) * math.log((1 - p[label]) / (1 - q[label]))
        rest = [i for i in range(len(s)) if i != label]
        q_rest, p_rest = ([x[i] / sum(x[j] for j in rest) for i in rest] for x in (q, p))
        nckd = sum(b * math.log(b / a) for a, b in zip(q_rest, p_rest, strict=True))
        total += alpha * tckd + beta * nckd
    return temperature**2 * total / len(student)


def naive_dist(student: list, teacher: list, temperature: float, beta: float, gamma: float) -> float:
    q, p = ([softmax(row, temperature) for row in x] for x in (student, teacher))
    inter = 1 - sum(pearson(a, b) for a, b in zip(q, p, strict=True)) / len(q)
    columns = range(len(q[0]))
    intra = 1 - sum(pearson([r[c] for r in q], [r[c] for r in p]) for c in columns) / len(columns)
    return temperature**2 * (beta * inter + gamma * intra)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(
    ("name", "naive", "weights"),
    [
        ("standardized", naive_standardized, {}),
        ("dkd", naive_dkd, {"alpha": 1.0, "beta": 8.0}),
        ("dkd", naive_dkd, {"alpha": 0.5, "beta": 2.0}),
        ("dist", naive_dist, {"beta": 2.0, "gamma": 2.0}),
        ("dist", naive_dist, {"beta": 0.0, "gamma": 1.0}),
    ],
)
def test_a_distance_is_what_its_paper_says(name: str, naive, weights: dict, temperature: float) -> None:
    student, teacher = outputs()
    task = compared_by(name, **weights)
    found = task.distance(student, teacher, LABELS, temperature)
    assert found.item() == pytest.approx(naive(student.tolist(), teacher.tolist(), temperature, **weights), rel=1e-9)
    found.backward()
    assert teacher.grad is None
    moved = 1e-6  # the gradient beside a difference quotient of the naive formula
    rows = student.tolist()
    for i, j in ((0, 0), (1, 3), (4, 2)):
        values = []
        for sign in (1, -1):
            shifted = [list(row) for row in rows]
            shifted[i][j] += sign * moved
            values.append(naive(shifted, teacher.tolist(), temperature, **weights))
        assert student.grad[i, j].item() == pytest.approx((values[0] - values[1]) / (2 * moved), rel=1e-5, abs=1e-8)


def test_the_parts_of_dkd_add_up_to_kl() -> None:
    """KL = TCKD + (1 - p_own) NCKD (equation 5): of one image, whose weight is then known."""
    student, teacher = (x[:1] for x in outputs())
    rest = 1 - teacher.softmax(1)[0, LABELS[0]].item()
    whole = compared_by("dkd", alpha=1.0, beta=rest).distance(student, teacher, LABELS[:1])
    torch.testing.assert_close(whole, kl(student, teacher))


@pytest.mark.parametrize("name", tasks.get().distances)
def test_equal_outputs_are_not_apart_and_have_no_gradient(name: str) -> None:
    student, _ = outputs()
    value = compared_by(name).distance(student, student, LABELS, 3.0)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-9) and student.grad.abs().max() < 1e-6
    alike = torch.zeros(5, 4, requires_grad=True)
    compared_by(name).distance(alike, torch.randn(5, 4), LABELS).backward()
    assert alike.grad.isfinite().all()
    shares = torch.nn.functional.one_hot(LABELS, 4) * 0.9 + 0.025
    torch.testing.assert_close(*[compared_by(name).distance(*outputs(), each) for each in (LABELS, shares)])


def test_the_usual_distance_is_untouched() -> None:
    student, teacher = outputs()
    expected = kl(student, teacher, 3.0, eps=1e-7, detach=False)
    for task in (tasks.get(), compared_by("kl")):
        assert torch.equal(task.distance(student, teacher, LABELS, 3.0, eps=1e-7, detach=False), expected)
        assert task.compares_as_usual


@pytest.mark.parametrize(
    ("method", "settings", "told"),
    [
        ("baseline", {"distance": "dkd"}, "--distance dkd: baseline compares no outputs as it is set"),
        (
            "clilr variant=paper",
            {"distance": "dkd"},
            "--distance dkd: with these settings the method has a cross-entropy",
        ),
        ("one", {"distance": "dkd", "distance_kwargs": {"gamma": 1}}, "no such setting; expected alpha or beta"),
        ("one", {"distance_kwargs": {"alpha": 1}}, "--distance kl has no such setting; it has none"),
        ("one", {"distance": "dist", "distance_kwargs": {"beta": -1}}, "beta=-1: expected a number of 0 or more"),
        ("one", {"distance": "cosine"}, "expected one of kl, standardized, dkd, dist"),
    ],
)
def test_what_has_no_meaning_is_refused(method: str, settings: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        name, *own = method.split()
        named = {"name": name, **dict(setting.split("=") for setting in own)}
        recipe = Recipe.from_dict({"method": named, "train": settings}, methods.settings)
        build_method(Tiny(), recipe, (3, 32, 32), 4, named=False)


def test_labels_that_do_not_depend_on_each_other_are_not_compared_by_class() -> None:
    with pytest.raises(RecipeError, match="--distance is not for --task multilabel: it compares the classes"):
        compress("resnet20_cifar", method="one", task="multilabel", distance="dist")


@pytest.mark.parametrize("name", ["kdcl", "lmcl", "mcl_okd", "one", "pcl", "sokd"])
def test_a_method_trains_with_the_distance_that_was_chosen(name: str) -> None:
    method, told = build(name), {}
    method.epoch.fill_(5), method.epochs.fill_(5)
    for distance in tasks.get().distances:
        method.task.compare_by(distance, {})
        torch.manual_seed(3)
        told[distance] = sum(method.eval()(*asked(method)).values()).item()
    assert len(set(told.values())) == 4 and all(math.isfinite(value) for value in told.values())
