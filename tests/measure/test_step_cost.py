"""What profile promises: the real steps, a fair plain target beside them, and the FLOPs and bytes a person counts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn

from okdc import methods, recipe
from okdc.anatomy import inspect
from okdc.cli import main, tables
from okdc.cohort import Branch, Cohort
from okdc.measure import step_cost
from okdc.measure.memory import rise
from okdc.measure.step_cost import Profile, profile
from okdc.recipe import Recipe

CPU = torch.device("cpu")


def profiled(rounds: int = 1, with_data: bool = False, **typed: Any) -> Profile:
    typed = {"model": "resnet20_cifar", "num_classes": 10, "device": "cpu", "batch_size": 4, **typed}
    return profile(recipe.override(Recipe(), typed, methods.settings), rounds=rounds, with_data=with_data)


def test_a_step_of_the_target_alone_costs_what_the_plain_one_does() -> None:
    found = profiled(rounds=3, method="baseline")
    assert found.plain_flops == found.cohort_flops > 0 and found.data is None
    assert [row.name for row in found.rows] == ["fp32", "fp32 channels-last", "bf16", "bf16 channels-last"]
    for row in found.rows:
        assert row.ratio.low <= row.ratio.median <= row.ratio.high and row.overhead == row.ratio.median
        assert 0.3 < row.ratio.median < 3  # a busy machine is allowed for
        assert abs(row.cohort_memory - row.plain_memory) < 2**20
    full, _, half, _ = found.rows
    assert full.speedup == 1 and half.plain_memory < full.plain_memory


@pytest.mark.parametrize(("method", "at_least"), [("pcl", 3.9), ("mcl_okd", 1.5)])
def test_flops_are_counted_forward_and_backward(method: str, at_least: float) -> None:
    found = profiled(method=method)
    assert found.flops_ratio > at_least and all(row.cohort_memory > 1.5 * row.plain_memory for row in found.rows)
    assert found.rows[0].overhead == pytest.approx(found.rows[0].ratio.median / found.flops_ratio)


def test_both_steps_train(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(step_cost, "_rows", lambda subjects, *_: seen.append(subjects) or ())
    profiled(method="ahbf", members=2, extra_blocks=1)
    for subject in seen[0].values():
        for state in (subject.plain, subject.cohort):  # one pass over the weights
            assert type(state.optimizer) is torch.optim.SGD and state.optimizer.defaults["fused"]
    steps = seen[0][False].plain.optimizer.state, seen[0][False].cohort.optimizer.state
    momenta = [sum(float(each["momentum_buffer"].abs().sum()) > 0 for each in state.values()) for state in steps]
    assert momenta[0] == len(list(seen[0][False].plain.method.parameters())) < momenta[1]


def test_memory_rises_by_what_is_held_at_once() -> None:
    weight, layer = torch.zeros(1000), nn.Linear(100, 50, bias=False)

    def twice_in_turn() -> None:
        for _ in range(2):
            x = weight + 1  # 4,000 bytes, gone before the next is there
            del x
        weight.add_(1)

    assert rise(twice_in_turn, CPU) == 4000
    assert rise(lambda: layer(torch.ones(8, 100)).sum().backward(), CPU) >= 4 * (
        800 + 5000
    )  # the images, and the gradient of the weight


def test_each_further_member_takes_the_memory_of_its_tail_alone() -> None:
    images = torch.randn(4, 3, 32, 32)

    def taken(members: int) -> tuple[int, int]:
        """Bytes that a step adds at its height, and of the weights."""
        target = timm.create_model("resnet20_cifar", num_classes=10)
        cohort = Cohort(target, images[:2], [Branch(inspect(target, images[:2]).cut(1))] * (members - 1))
        for parameter in cohort.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step = rise(lambda: torch.stack([z.sum() for z in cohort(images).logits]).sum().backward(), CPU)
        return step, sum(p.nbytes for p in cohort.parameters())

    (step, weights), second, third = (taken(members) for members in (1, 2, 3))
    more = second[0] - step, second[1] - weights
    assert (third[0] - second[0], third[1] - second[1]) == more
    assert 0 < more[0] < 0.15 * step and 0.7 < more[1] / weights < 0.8


def test_the_command_prints_json_or_a_table_and_measures_the_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_cost, "DATA_BATCHES", 5)
    words = "profile --model resnet20_cifar --method one --device cpu -b 16 --rounds 1 --data digits --workers 0 --json"
    told = CliRunner().invoke(main, words.split(), catch_exceptions=False)
    found = json.loads(told.stdout)
    assert found["flops_ratio"] > 1 and len(found["rows"]) == 4 and found["rows"][0]["ratio"]["median"] > 0
    assert found["data"]["name"] == "digits" and found["data"]["images_per_second"] > 0
    assert 0 <= found["data"]["waiting"] < 1
    flat = step_cost.Spread(2.0, 1.5, 2.5)
    row = step_cost.Row("fp32", flat, flat, flat, flat, flat, 0.876, 1.0, 2**20, 5 * 2**20)
    data = step_cost.DataSpeed("digits", 31000.0, 0.25)
    tables.show_profile(Profile("resnet18", "one", (3, 8, 8), 16, "CPU", 1, 7, 100, 150, (row,), data))
    shown = capsys.readouterr().out
    assert "Measured where asked for: compiled steps, --torchcompile." in shown
    assert "2.00 (1.50-2.50)" in shown and "0.88" in shown and "31,000 training images a second" in shown


def test_a_network_that_a_method_cannot_serve_is_refused_in_a_paragraph() -> None:
    refused = CliRunner().invoke(main, ["profile", "--model", "resnet20_cifar", "--method", "ahbf", "--cut", "nowhere"])
    assert refused.exit_code == 2 and "nowhere" in refused.output and "Traceback" not in refused.output
