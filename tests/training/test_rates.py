"""Learning rates of layers and of branches: timm's for the target, resumed exactly, and nothing where nobody asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import timm.optim
import timm.scheduler
import torch
from torch import nn

from okdc.cohort import Branch, Cohort
from okdc.errors import RecipeError, RunError
from okdc.networks import cifar
from tests.helpers.training import CLASSES, SETTINGS, Crash, Tiny, assert_same_run, crash_at, run, tiny_data


class OnTimm(Tiny):
    """A network of timm's and a branch of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        target = timm.create_model("test_resnet", num_classes=CLASSES)
        self.cohort = Cohort(target, torch.randn(2, 3, 8, 8), [Branch("layer2")])


RATES = replace(SETTINGS, layer_decay=0.5, branch_lr_scale=3.0, recovery_interval=1, warmup_epochs=1, min_lr=0.01)


def rates(groups: list[dict]) -> dict[nn.Parameter, float]:
    return {parameter: group["lr"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("sched", ["cosine", "none"])
def test_the_targets_layers_have_timms_rates_and_branches_their_own(tmp_path: Path, sched: str) -> None:
    settings = replace(RATES, sched=sched)
    state = run(tmp_path, replace(settings, epochs=3), method=OnTimm())
    target = state.method.cohort.target
    theirs = timm.optim.create_optimizer_v2(target, "sgd", lr=0.05, layer_decay=0.5)
    if sched == "cosine":
        timm.scheduler.create_scheduler_v2(theirs, "cosine", 3, warmup_epochs=1, warmup_lr=1e-5, min_lr=0.01)[0].step(3)
        assert state.lr == pytest.approx(0.01)
    else:
        for group in theirs.param_groups:
            group["lr"] *= group["lr_scale"]
        assert state.lr == pytest.approx(0.05)
    found, expected = rates(state.optimizer.param_groups), rates(theirs.param_groups)
    assert {p: found[p] for p in target.parameters()} == pytest.approx(expected)
    assert len(set(expected.values())) > 4 and max(expected.values()) == pytest.approx(state.lr)
    own = [p for p in state.method.cohort.branches.parameters() if p not in expected]
    assert own and {found[p] for p in own} == {3 * state.lr}
    assert len(found) == len(own) + len(expected)
    assert {group["weight_decay"] for group in state.optimizer.param_groups} == {settings.weight_decay}


def test_a_run_with_rates_of_its_own_resumes_exactly_and_with_no_others(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", RATES, method=OnTimm())
    with pytest.raises(Crash):
        run(tmp_path / "cut", RATES, method=OnTimm(), data=tiny_data(crash_at(1, 4)))
    last = tmp_path / "cut" / "last.pth.tar"
    for other in ({"layer_decay": 0.6}, {"branch_lr_scale": 1.0}):
        (name,) = other
        with pytest.raises(RunError, match=f"has {name} {getattr(RATES, name)}"):
            run(tmp_path / "cut", replace(RATES, **other), method=OnTimm(), resume=last)
    resumed = run(tmp_path / "cut", RATES, method=OnTimm(), resume=last)
    assert_same_run(whole, resumed, tmp_path / "whole", tmp_path / "cut")
    usual = run(tmp_path / "usual", replace(RATES, layer_decay=None, branch_lr_scale=1.0), method=OnTimm())
    assert [group.keys() & {"lr_scale"} for group in usual.optimizer.param_groups] == [set()]


def test_what_has_no_layers_or_no_branches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--layer-decay needs the order of .* and Sequential does not"):
        run(tmp_path, replace(SETTINGS, layer_decay=0.7))
    with pytest.raises(RecipeError, match="--branch-lr-scale is of other members, and there are none"):
        run(
            tmp_path,
            replace(SETTINGS, branch_lr_scale=2.0),
            method=Tiny(timm.create_model("test_resnet", num_classes=3)),
        )
    assert not (tmp_path / "last.pth.tar").exists()


@pytest.mark.parametrize("name", ["resnet20_cifar", "wrn_40_1_cifar", "vgg16_cifar"])
def test_the_cifar_networks_state_their_layers(name: str) -> None:
    assert name in cifar.default_cfgs
    network = timm.create_model(name)
    scale = {
        p: group["lr_scale"]
        for group in timm.optim.param_groups_layer_decay(network, layer_decay=0.9)
        for p in group["params"]
    }
    blocks = {key: scale[p] for key, p in network.named_parameters() if key.startswith("stages")}
    in_order = list(blocks.values())
    assert in_order == sorted(in_order) and max(in_order) == pytest.approx(0.9), "the head alone comes after"
    assert len(set(in_order)) == {"resnet20_cifar": 9, "wrn_40_1_cifar": 18, "vgg16_cifar": 13}[name]
    assert {scale[p] for key, p in network.named_parameters() if key.startswith(("norm", "hidden", "fc"))} == {1.0}
