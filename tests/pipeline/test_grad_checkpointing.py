"""--grad-checkpointing: the same weights, a plain network afterwards, and refused where it would be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import okdc
from okdc.errors import NetworkError, OkdcError, RecipeError
from okdc.training import checkpoint


def batches() -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(8) % 4
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + labels.view(-1, 1, 1, 1)
    return [(images, labels)] * 2


def compress(folder: Path, model: Any = "test_resnet", **settings: Any) -> nn.Module:
    usual = {"num_classes": 4, "batch_size": 8, "epochs": 2, "lr": 0.1, "sched": "none", "onnx": False, "device": "cpu"}
    usual |= {"grad_checkpointing": True, "method": "one", "output": folder}
    return okdc.compress(model, batches(), batches(), **usual | settings).student


def is_on(network: nn.Module) -> bool:
    return any(getattr(module, "grad_checkpointing", False) for module in network.modules())


@pytest.mark.parametrize("method", ["one", "clilr"])
def test_the_weights_are_those_of_training_without_it(method: str, tmp_path: Path) -> None:
    plain = compress(tmp_path / "plain", method=method, cut="layer3.0", grad_checkpointing=False)
    again = compress(tmp_path / "again", method=method, cut="layer3.0")
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    seen = [network.layer1[0].bn1.num_batches_tracked.item() for network in (plain, again)]
    assert seen[0] > 0 and seen[1] == 2 * seen[0], "blocks are run again, and their norms see the batch again"
    assert not is_on(plain) and not is_on(again), "files are written of the plain network"


def test_a_run_goes_on_exactly(tmp_path: Path) -> None:
    compress(tmp_path, experiment="whole")
    compress(tmp_path, experiment="cut", epochs=1)
    compress(tmp_path, experiment="cut", resume="auto")
    whole, cut = (checkpoint.load(tmp_path / name / "last.pth.tar")["okdc"]["method"] for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert [key for key, value in whole.items() if isinstance(value, Tensor) and not torch.equal(value, cut[key])] == []


def test_a_network_that_came_with_it_keeps_it(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=4)
    network.set_grad_checkpointing(True)
    assert compress(tmp_path, network, num_classes=None, epochs=1) is network and is_on(network)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"model": "resnet20_cifar"}, NetworkError, "CifarNet has no set_grad_checkpointing, as most networks of timm"),
        ({"model": "dla46x_c"}, NetworkError, "DLA says: gradient checkpointing not supported.* --grad-accum-steps"),
        ({"method": "lmcl"}, RecipeError, "Lmcl tries out other weights .* leave out --grad-checkpointing"),
    ],
    ids=["no switch", "refuses", "second order"],
)
def test_it_is_refused_in_words(settings: dict, error: type[OkdcError], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        compress(tmp_path, **settings)
