"""Batches of one image: what can learn from them does, what cannot says so, and a network must keep the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import okdc
from okdc.data import wrap
from okdc.errors import NetworkError, TrainingError
from tests.helpers.networks import Tiny

SETTINGS = {"method": "baseline", "epochs": 1, "batch_size": 1, "lr": 0.1, "onnx": False, "device": "cpu"}


def singles(side: int, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(1, 3, side, side), torch.tensor([i % 4])) for i in range(count)]


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize(("network", "side"), [(plain(), 8), (Tiny(), 16)], ids=["no norm", "norm of many pixels"])
def test_a_network_that_can_learns_from_single_images(network: nn.Module, side: int, tmp_path: Path) -> None:
    before = [p.detach().clone() for p in network.parameters()]
    result = okdc.compress(network, singles(side), singles(side), output=tmp_path, **SETTINGS)
    assert result.data.sizes[0] == 8 and result.metrics["skipped_steps"] == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, network.parameters()))


def test_batch_norm_over_one_value_is_said_and_the_run_goes_on_with_larger_batches(tmp_path: Path) -> None:
    run = {"output": tmp_path, "experiment": "run"}
    with pytest.raises(TrainingError, match=r"one image: .* one pixel left.* -b 2.*--resume .*last\.pth\.tar"):
        okdc.compress(Tiny(), singles(4), singles(4), **SETTINGS | run)
    pairs = [(torch.cat([a, b]), torch.cat([x, y])) for (a, x), (b, y) in zip(singles(4), singles(4))]
    result = okdc.compress(Tiny(), pairs, pairs, **SETTINGS | run | {"batch_size": 2, "resume": "auto"})
    assert result.metrics["epochs"] == 1


@pytest.mark.parametrize(("sizes", "kept"), [([4, 4, 1], [4, 4]), ([1, 1, 1], [1, 1, 1]), ([1, 4, 1], [1, 4, 1])])
def test_a_single_image_is_left_out_among_larger_batches_alone(sizes: list[int], kept: list[int]) -> None:
    loader = [(torch.randn(n, 3, 8, 8), torch.arange(n) % 2) for n in sizes]
    data = wrap(loader, num_classes=2)
    assert [len(labels) for _, labels in data.train.batches(0)] == kept


class Squeezed(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


class First(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class Pixels(Tiny):
    """Logits for every pixel: no classifier."""

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.early(self.stem(x)))[:, :4]


@pytest.mark.parametrize(("kind", "shape"), [(Squeezed, r"\(4,\)"), (First, r"\(4,\)"), (Pixels, r"\(1, 4, 4, 4\)")])
def test_a_network_that_gives_no_row_for_each_image_is_refused(kind: type[Tiny], shape: str, tmp_path: Path) -> None:
    loader = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    told = rf"{kind.__name__} returns a tensor {shape} for a batch of one image, expected .*\(batch, classes\)"
    with pytest.raises(NetworkError, match=told):
        okdc.compress(kind(), loader, loader, output=tmp_path, **SETTINGS)


def test_a_network_without_values_is_refused(tmp_path: Path) -> None:
    loader = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    with torch.device("meta"):
        whole = Tiny()
    part = Tiny()
    part.head.to("meta")
    for network, name in ((whole, "stem.0.weight"), (part, "head.weight")):
        with pytest.raises(NetworkError, match=rf"'{name}' of Tiny is on the meta device.*to_empty\(device='cpu'\)"):
            okdc.compress(network, loader, loader, output=tmp_path, **SETTINGS)
