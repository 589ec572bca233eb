"""What `inspect` says about networks of different kinds."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import timm
import torch

from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort
from okdc.errors import NetworkError
from okdc.networks import load as build
from okdc.recipe import NetworkSettings
from tests.helpers import networks, staged


def test_hierarchical_network() -> None:
    anatomy = inspect(timm.create_model("resnet18", num_classes=10), (3, 64, 64))
    assert (anatomy.classifier, anatomy.embedding, anatomy.feature_map) == ("fc", 512, "layer4")
    assert anatomy.feature_shape == (512, 2, 2) and anatomy.layout == "nchw"
    assert [s.size for s in anatomy.stages] == [256, 64, 16, 4]
    assert [s.blocks[-1] for s in anatomy.stages] == [(f"layer{i}.1",) for i in (1, 2, 3, 4)]
    assert anatomy.cut(1) == "layer3" and anatomy.cut(2) == "layer2"
    assert anatomy.params == 11181642
    shares = {c.name: c for c in anatomy.cuts}
    assert shares["layer3"].flops_after < shares["layer2"].flops_after < 1
    assert abs(shares["layer3"].params_after - 8398858 / 11181642) < 1e-6


def test_units_of_one_convolution_are_the_blocks_of_a_plain_network() -> None:
    anatomy = inspect(timm.create_model("vgg16_cifar"), (3, 32, 32))
    assert [(s.size, len(s.blocks), s.plain) for s in anatomy.stages] == [
        (1024, 1, True), (256, 1, True), (64, 2, True), (16, 2, True), (4, 3, True),
    ]  # fmt: skip
    assert (anatomy.cut(), anatomy.stages[-1].last) == ("stages.3", "stages.4.2"), "before the pooling"


def test_convolutions_of_a_stem_make_no_stage_before_blocks() -> None:
    assert [(s.size, len(s.blocks)) for s in inspect(staged.DeepStem(), (3, 32, 32)).stages] == [(64, 2), (16, 1)]
    assert [(s.size, s.plain) for s in inspect(staged.Plain(), (3, 32, 32)).stages[:2]] == [(1024, True), (256, True)]


def test_single_pixel_feature_map_on_small_images() -> None:
    anatomy = inspect(timm.create_model("resnet18", num_classes=10), (3, 32, 32))
    assert anatomy.feature_map == "layer4" and anatomy.feature_shape == (512, 1, 1)


def test_a_shortcut_that_pools_to_a_single_pixel_ends_no_stage() -> None:
    anatomy = inspect(timm.create_model("resnet50d", num_classes=10), (3, 32, 32))
    assert (anatomy.feature_map, anatomy.cut()) == ("layer4", "layer3")
    assert anatomy.stages[-1].blocks == (("layer4.1",), ("layer4.2",))


def test_isotropic_network_parts_after_two_thirds_of_its_blocks() -> None:
    anatomy = inspect(networks.Tokens(depth=6), (3, 32, 32))
    assert anatomy.layout == "tokens" and anatomy.embedding == 16 and anatomy.feature_map == "norm"
    assert anatomy.cut() == "blocks.3"
    assert [run[0] for run in anatomy.stages_after("blocks.3")[-1].blocks] == ["blocks.4", "blocks.5"]


def test_channels_last_network() -> None:
    anatomy = inspect(timm.create_model("swin_tiny_patch4_window7_224", num_classes=10))
    assert anatomy.layout == "nhwc" and anatomy.feature_shape == (7, 7, 768)


def test_the_network_is_left_as_it_was() -> None:
    network = networks.Tiny().train()
    network.late.eval()
    network.head.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    inspect(network, (3, 32, 32))
    assert network.training and not network.late.training and network.stem.training
    assert not network.head.weight.requires_grad and network.head.bias.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks for m in network.modules())


def test_the_cuts_that_are_offered() -> None:
    anatomy = inspect(timm.create_model("resnet18", num_classes=10), (3, 64, 64))
    names = [c.name for c in anatomy.choices()]
    assert names == ["maxpool", "layer1.0", "layer1", "layer2.0", "layer2", "layer3.0", "layer3", "layer4.0"]
    assert "layer3 (23%, the default)" in anatomy.choices_in_words()
    assert "layer3 (" not in anatomy.choices_in_words(but="layer3")
    with pytest.raises(NetworkError, match=r"Good cuts: maxpool \(93%\), .*layer3 \(23%, the default\)"):
        anatomy.find_cut("zzz")


@pytest.mark.parametrize("name", ["nest_tiny", "hrnet_w18_small", "torchvision/alexnet"])
def test_a_last_stage_that_is_most_of_the_network_is_parted(name: str) -> None:
    anatomy = inspect(build(NetworkSettings(model=name, img_size=64), 10), (3, 64, 64))
    share = anatomy.find_cut(anatomy.cut()).flops_after
    last = anatomy.stages[-1].before
    assert last is not None and anatomy.find_cut(last).flops_after > 0.6
    assert 0.05 <= share < anatomy.find_cut(last).flops_after


def test_a_last_stage_of_one_token() -> None:
    anatomy = inspect(timm.create_model("levit_128s", num_classes=10, img_size=64), (3, 64, 64))
    assert (anatomy.feature_map, anatomy.feature_shape, anatomy.cut()) == ("stages", (1, 384), "stages.1")


def test_a_classifier_of_every_token() -> None:
    class Pooled(torch.nn.Module):  # CLIP's: each token is projected, then the first is taken
        def __init__(self) -> None:
            super().__init__()
            self.early = torch.nn.Conv2d(3, 16, 3, stride=4, padding=1)
            self.late = torch.nn.Conv2d(16, 16, 3, padding=1)
            self.proj = torch.nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.late(self.early(x).relu()).flatten(2).transpose(1, 2)
            return self.proj(torch.cat([x.mean(1, keepdim=True), x], 1))[:, 0]

    network = Pooled()
    anatomy = inspect(network, (3, 32, 32))
    assert (anatomy.classifier, anatomy.embedding) == ("proj", 16)
    cohort = Cohort(network, torch.randn(2, 3, 32, 32), [Branch("early")], taps=("embeddings",))
    assert cohort(torch.randn(2, 3, 32, 32)).embeddings[1].shape == (2, 16)


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda network: torch.compile(network, backend="eager"), r"net\._orig_mod; --torchcompile"),
        (torch.nn.DataParallel, r"DataParallel.*net\.module; --devices"),
        (lambda network: torch.jit.trace(network, torch.zeros(2, 3, 32, 32)), "TorchScript.*Pass the nn.Module"),
    ],
)
def test_a_wrapped_network_is_refused_with_how_to_unwrap_it(wrap, words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        wrapped = wrap(networks.Tiny())
    with pytest.raises(NetworkError, match=words):
        inspect(wrapped, (3, 32, 32))


def test_the_ways_out_of_a_refused_cut() -> None:
    several = inspect(timm.create_model("resnet18", num_classes=10), (3, 64, 64)).ways_out("layer3", "take peers")
    assert several.startswith("Cut elsewhere with --cut NAME, such as maxpool (93%)") and several.endswith(
        ". Or take peers."
    )
    tiny = inspect(networks.Tiny(), (3, 32, 32))
    assert [c.name for c in tiny.choices()] == ["early"] and "such as stem (" in tiny.ways_out("early", "take peers")
    only = replace(tiny, cuts=(tiny.find_cut("early"),))
    assert only.ways_out("early", "take peers") == "Take peers."


@pytest.mark.parametrize(
    ("wrapped", "words"),
    [
        (lambda y: {"out": {"aux": None, "logits": y}}, r"return super\(\).forward\(images\)\['out'\]\['logits'\]"),
        (lambda y: [y[:, :, None], y], r"return super\(\).forward\(images\)\[1\]"),
        (lambda y: y[:, 0], r"returned a tensor \(2,\).*Nothing of that is such a tensor"),
    ],
)
def test_where_the_logits_are_in_what_a_network_returns(wrapped, words: str) -> None:
    class Other(networks.Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return wrapped(super().forward(x))

    with pytest.raises(NetworkError, match=words):
        inspect(Other(), (3, 32, 32))
