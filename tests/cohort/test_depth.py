"""Branches are deepened by the network's own blocks: in turn, refitted, re-projected; else by okdc's."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort
from okdc.cohort.depth import ResidualAttention
from okdc.cohort.refit import Reprojected, refit
from tests.helpers import networks, staged

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def grown(network: nn.Module, blocks: int = 1, images: torch.Tensor = IMAGES) -> Cohort:
    """A cohort with one deeper branch from the default cut, after a step's gradients."""
    torch.manual_seed(0)
    cut = inspect(network, images).cut()
    anatomy = inspect(network, images)
    cohort = Cohort(network, images, [Branch(cut, (blocks,) * len(anatomy.stages_after(cut)))])
    sum(z.square().sum() for z in cohort.train()(images).logits).backward()
    assert [n for n, p in cohort.branches.named_parameters() if p.grad is None] == []
    return cohort


@pytest.mark.parametrize(
    ("kind", "cut", "expected"),
    [
        (staged.Alternating, "windows.2", "1 x Window after windows.3"),
        (staged.OneStrided, "early", "1 x Strided after late"),
        (staged.Dense, "late.0", "1 x Reprojected after late.1"),
        (staged.LinearAsConvolution, "early", "1 x Conv2d-BatchNorm2d-ReLU after late.2"),
        (staged.LateClassToken, "blocks.19", "1 x TransformerEncoderLayer after blocks.29"),
        (staged.SideBranch, "early", "1 x Conv2d-BatchNorm2d-ReLU after late.2"),
        (staged.Convolutional, "early", "1 x Conv2d-BatchNorm2d-ReLU after late.2"),
        (staged.Plain, "groups.2", "1 x ConvNormAct after groups.3.1"),
        (staged.OfWrapped, "early", "1 x MixerBlock after late.2"),
        (staged.WrittenOut, "early", "1 x Wrapped-Conv2d after late.2"),
    ],
)
def test_the_block_and_the_cut(kind: type[nn.Module], cut: str, expected: str) -> None:
    cohort = grown(kind())
    assert cohort.cut == cut
    assert cohort.grown == [expected]


def test_blocks_that_take_turns_go_on_taking_turns() -> None:
    branch = grown(staged.Alternating(), blocks=3).branches[0]
    assert [window.shift for window in branch.windows[-1].further] == [0, 1, 0]
    assert [window.shift for window in branch.windows[:3]] + [branch.windows[3].first.shift] == [0, 1, 0, 1]


def test_a_refitted_block_keeps_the_shape_and_every_layer() -> None:
    block = staged.Strided(8, 16)
    made = refit(block, torch.randn(2, 16, 8, 8))
    assert made(torch.randn(2, 16, 8, 8)).shape == (2, 16, 8, 8)
    assert made.norm.num_features == 16 and made.norm.running_mean.shape == (16,)
    assert made.body[0].stride == (1, 1) and made.body[0].weight.shape == (16, 16, 3, 3)
    assert block.norm.num_features == 8 and block.body[0].stride == (2, 2), "the original is left alone"
    ratio = made.body[0].weight.std() / block.body[0].weight.std()
    assert 0.6 < ratio < 0.85, "the spread follows the number of inputs: sqrt(1/2)"
    assert not any(m._forward_pre_hooks for m in made.modules())


def test_depthwise_blocks_are_refitted() -> None:
    made = refit(networks.Inverted(8, 16, 2), torch.randn(2, 16, 8, 8))
    assert made.widen.in_channels == 16 and made.depthwise.groups == made.depthwise.in_channels == 16


def test_growing_channels_are_projected_back() -> None:
    made = refit(staged.DenseLayer(8), torch.randn(2, 16, 8, 8))
    assert isinstance(made, Reprojected) and made(torch.randn(2, 16, 8, 8)).shape == (2, 16, 8, 8)


def test_blocks_that_join_or_take_a_list_are_projected_back() -> None:
    class Joins(staged.DenseLayer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, super().forward(x)], 1)

    class Listed(staged.DenseLayer):
        def forward(self, x: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
            return super().forward(torch.cat(x, 1))

    x = torch.randn(2, 16, 8, 8)
    assert refit(Joins(8), x)(x).shape == refit(Listed(8), x, ([x[:, :8]],))(x).shape == x.shape


def test_what_cannot_be_refitted_is_said() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, 4, 8, 8)

    assert refit(Fixed(), torch.randn(2, 16, 8, 8)) is None


def test_tokens_without_a_block_get_attention() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 8, 8)
            self.mix = nn.Linear(16, 24)
            self.out = nn.Linear(24, 24)
            self.head = nn.Linear(24, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.mix(self.patch(x).flatten(2).transpose(1, 2))
            return self.head(self.out(torch.relu(x)).mean(1))

    cohort = grown(Flat())
    assert cohort.grown == ["1 x ResidualAttention after out"]
    assert any(isinstance(m, ResidualAttention) for m in cohort.branches.modules())


def test_maps_without_a_block_get_convolutions() -> None:
    class Depthwise(networks.Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Conv2d(16, 32, 3, 2, 1, groups=16)  # type: ignore[assignment]

    assert grown(Depthwise()).grown == ["1 x ResidualConv after late"]


def test_blocks_of_two_streams_are_repeated() -> None:
    assert grown(networks.TwoStreams()).grown == ["1 x Streams after pairs.5"]


def test_embedding_of_a_convolutional_classifier_is_averaged() -> None:
    network = staged.Convolutional()
    cohort = Cohort(network, IMAGES, [Branch("early")], taps=("embeddings",))
    assert inspect(network, IMAGES).embedding == 32 and cohort.embedding_widths == (32, 32)


@pytest.mark.parametrize(
    ("name", "cut", "expected"),
    [
        ("resnet10t", "layer3", "1 x BasicBlock after layer4.0"),
        ("test_byobnet", "stages.2", "1 x BottleneckBlock after stages.3.0"),
        ("cs3darknet_focus_s", "stages.2", "1 x DarkBlock after stages.3.blocks.0"),
        ("vit_tiny_patch16_dinov3_qkvb", "blocks.7", "1 x EvaBlock after blocks.11"),
        ("shvit_s1", "stages.1", "1 x BasicBlock after stages.2.blocks.4"),
        ("cpubone_nano", "stages.3.1", "1 x CPUBoneBlock after stages.3.2"),
    ],
)
def test_networks_of_timm(name: str, cut: str, expected: str) -> None:
    size = {"img_size": 64} if name.startswith("vit") else {}
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    cohort = grown(timm.create_model(name, num_classes=4, **size), images=images)
    assert (cohort.cut, cohort.grown) == (cut, [expected])
