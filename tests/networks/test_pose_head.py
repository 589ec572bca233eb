"""Heads of heat maps on small networks of every layout; timm's forward_intermediates says what the map is."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from okdc.errors import NetworkError
from okdc.networks.pose_head import FeatureMap, with_pose_head
from tests.helpers.networks import Tiny

SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 2}
VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2}
NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "nchw": ("mobilenetv3_small_050", {}, (3, 96, 64)),
    "nhwc": ("swin_tiny_patch4_window7_224", SWIN | {"img_size": (64, 32)}, (3, 64, 32)),
    "tokens": ("vit_tiny_patch16_224", VIT | {"img_size": (64, 32)}, (3, 64, 32)),
}


def network(layout: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    name, arguments, size = NETWORKS[layout]
    return timm.create_model(name, **arguments), size


@pytest.mark.parametrize("layout", NETWORKS)
def test_the_map_is_the_networks_own_whatever_its_layout(layout: str) -> None:
    backbone, size = network(layout)
    images = torch.randn(2, *size)
    last, maps = backbone.eval().forward_intermediates(images, norm=layout == "tokens", output_fmt="NCHW")
    expected = {"nchw": last, "nhwc": last.movedim(-1, 1), "tokens": maps[-1]}[layout]
    features = FeatureMap(backbone, size)
    assert features.layout == layout
    found = features(images)
    assert found.shape == (2, features.width, *features.size)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("head", ["deconv", "upsample"])
@pytest.mark.parametrize("layout", NETWORKS)
def test_maps_are_a_quarter_of_the_image_and_everything_learns(layout: str, head: Any) -> None:
    backbone, size = network(layout)
    pose = with_pose_head(backbone, 5, size, head=head).train()
    maps = pose(torch.randn(2, *size))
    assert maps.shape == (2, 5, size[1] // 4, size[2] // 4)
    maps.square().sum().backward()
    assert [name for name, p in pose.named_parameters() if p.grad is None] == []


def test_the_head_is_as_wide_as_asked_and_begins_small() -> None:
    backbone, size = network("nchw")
    with torch.no_grad():
        pose = with_pose_head(backbone, 5, size, width=24, stride=8)
    layers = [layer for layer in pose.head if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d))]
    assert [layer.weight.shape[:2] for layer in layers] == [(288, 24), (24, 24), (5, 24)]
    assert pose(torch.randn(2, *size)).shape == (2, 5, 12, 8)
    assert all(0.0008 < layer.weight.std() < 0.0012 for layer in layers) and not layers[-1].bias.any()
    narrow = timm.create_model("resnet20_cifar")
    assert (
        with_pose_head(narrow, 5, (3, 32, 32)).head[0].in_channels == 64
    )  # a map large enough has a head of one layer


def test_a_stride_that_is_no_power_of_two_comes_as_near_as_it_can() -> None:
    pose = with_pose_head(timm.create_model("levit_128s"), 2, (3, 224, 224)).eval()
    assert pose.features.size == [4, 4]  # its metadata says 14
    assert pose(torch.zeros(1, 3, 224, 224)).shape == (1, 2, 64, 64)


def test_weights_keep_their_names_and_the_mode_is_kept() -> None:
    backbone, size = network("nchw")
    keys = set(backbone.eval().state_dict())
    pose = with_pose_head(backbone, 5, size)
    assert not pose.training
    of_backbone = {key.removeprefix("features.network.") for key in pose.state_dict() if key.startswith("features.")}
    assert of_backbone < keys and {key.partition(".")[0] for key in keys - of_backbone} == {"conv_head", "classifier"}


def test_what_has_no_features_is_refused() -> None:
    with pytest.raises(NetworkError, match="Tiny has no forward_features"):
        with_pose_head(Tiny(), 5, (3, 32, 32))
