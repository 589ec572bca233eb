"""--freeze: what is named leaves training as it came, in a network of any origin; a wrong name is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import okdc
from okdc import networks
from okdc.errors import NetworkError, RunError
from okdc.measure.estimate import estimate
from okdc.pipeline.assemble_cohort import build_method
from okdc.recipe import NetworkSettings, resolve
from okdc.training import checkpoint
from tests.helpers.networks import Tiny


def batches() -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(8) % 4
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + labels.view(-1, 1, 1, 1)
    return [(images, labels)] * 2


def compress(model: Any, folder: Path, **settings: Any) -> nn.Module:
    usual = {"batch_size": 8, "epochs": 2, "lr": 0.1, "onnx": False, "device": "cpu", "output": folder}
    return okdc.compress(model, batches(), batches(), **usual | {"method": "one", **settings}).student


def moved(before: dict[str, Tensor], after: nn.Module) -> set[str]:
    return {key for key, value in after.state_dict().items() if not torch.equal(value, before[key])}


def test_frozen_modules_of_an_object_and_of_a_named_checkpoint_stay(tmp_path: Path) -> None:
    network = Tiny()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    changed = moved(before, compress(network, tmp_path, freeze=["stem", "early.1"]))
    assert not [key for key in changed if key.startswith(("stem.", "early.1."))]
    assert {"early.0.weight", "late.1.running_mean", "head.weight"} <= changed
    assert all(p.requires_grad for p in network.parameters()), "it is frozen for a run, not for ever"

    source = networks.load(NetworkSettings(model="resnet20_cifar"), 4)
    torch.save(source.state_dict(), tmp_path / "start.pth")
    named = {"checkpoint": str(tmp_path / "start.pth"), "freeze": ["stem", "stages.0"], "num_classes": 4}
    changed = moved(source.state_dict(), compress("resnet20_cifar", tmp_path, private_stages=1, **named))
    assert changed and not [key for key in changed if key.startswith(("stem.", "stages.0."))]
    assert {"stages.1.0.conv1.weight", "stages.1.0.bn1.running_mean"} <= changed


def test_branches_of_a_named_network_have_what_is_frozen_of_the_target() -> None:
    recipe = resolve(flat={"model": "resnet20_cifar", "method": "one", "data": "digits", "freeze": ["stages.2.0"]})
    target = networks.load(recipe.network, 4)
    networks.freeze(target, recipe.train.freeze)
    method = build_method(target, recipe, (3, 32, 32), 4, named=True).train()
    frozen, learns = target.state_dict(), "stages.2.1.conv1.weight"
    for branch in method.cohort.branches:
        block = branch.get_submodule("stages.2.0")
        assert not block.training and not any(p.requires_grad for p in block.parameters())
        assert all(torch.equal(value, frozen[f"stages.2.0.{key}"]) for key, value in block.state_dict().items())
        assert not torch.equal(branch.state_dict()[learns], frozen[learns])
    method.strip()


def test_a_run_goes_on_exactly_and_only_with_what_it_froze(tmp_path: Path) -> None:
    settings = {"method": "baseline", "num_classes": 4, "sched": "none", "freeze": ["stem", "stages.0"]}
    compress("resnet20_cifar", tmp_path, experiment="whole", **settings)
    compress("resnet20_cifar", tmp_path, experiment="cut", epochs=1, **settings)
    with pytest.raises(RunError, match=r"has freeze \['stages.0', 'stem'\], this run None"):
        compress("resnet20_cifar", tmp_path, experiment="cut", resume="auto", **settings | {"freeze": []})
    compress("resnet20_cifar", tmp_path, experiment="cut", resume="auto", **settings)
    whole, cut = (checkpoint.load(tmp_path / name / "last.pth.tar")["state_dict"] for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(value, cut[key]) for key, value in whole.items())


def test_names_that_are_none_and_nothing_left_to_train_are_told(tmp_path: Path) -> None:
    for freeze, words in (
        (
            ["stem", "earli"],
            r"--freeze earli: Tiny has no .* Did you mean early.*\? .* stem, early, late, head\.",
        ),
        (["stem", "early", "late", "head"], "leaves nothing of the network to train"),
    ):
        network = Tiny()
        with pytest.raises(NetworkError, match=words):
            compress(network, tmp_path, freeze=freeze)
        assert all(p.requires_grad for p in network.parameters()) and all(m.training for m in network.modules())


def test_the_estimate_counts_what_learns() -> None:
    given = {"model": "resnet20_cifar", "num_classes": 4, "method": "baseline"}
    whole, part = (estimate(resolve(None, flat=given | {"freeze": freeze})) for freeze in ([], ["stages.2"]))
    assert 0 < part.trained_params < whole.trained_params / 2
