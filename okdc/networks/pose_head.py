"""A network that gives heat maps of key points: any backbone's last feature map, made larger by a head (Xiao 2018).

The head is that of Simple Baselines (Xiao, Wu, Wei, ECCV 2018): deconvolutions that double the map until it is about a
quarter of the image, then a 1x1 convolution. What the backbone gives, and how large it is, is found by running it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn

from okdc.anatomy.calls import watch
from okdc.anatomy.shapes import layout
from okdc.errors import NetworkError
from okdc.tasks.shared.outputs import described

Head = Literal["deconv", "upsample"]

POSE = "pose"  # the task of networks that have such a head

STRIDE = 4  # of the heat maps, where the backbone's own map times a power of two can have it
WIDTH = 64  # of the head, unless the backbone is narrower; the paper's is 256


class FeatureMap(nn.Module):
    """A timm network as far as its last feature map, (B, D, h, w) of images (B, C, H, W), however it lays that out.

    `classifier` and what else comes after is gone; the names of what is left are the network's own. NetworkError for a
    network that gives neither map nor tokens of a grid.
    """

    def __init__(self, network: nn.Module, input_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.network = network
        self.layout, self.grid = "nchw", (0, 0)
        network.reset_classifier(0)  # type: ignore[operator]
        example = next(network.parameters()).new_zeros(2, *input_size)
        calls, given = watch(self, example)
        if not isinstance(given, Tensor) or given.dim() not in (3, 4):
            raise NetworkError(
                f"forward_features of {type(network).__name__} gives {described(given)} for images "
                f"{tuple(example.shape)}; a head of heat maps needs one map or its tokens. Choose another --model."
            )
        _drop_unused(network, {call.name.removeprefix("network.") for call in calls})
        aspect = input_size[1] / input_size[2]
        self.layout = layout(tuple(given.shape[1:]), aspect)
        if self.layout == "tokens":
            self.grid = _grid(network, given.shape[1], aspect)
        self.width, *self.size = self.as_map(given).shape[1:]

    def forward(self, images: Tensor) -> Tensor:
        return self.as_map(self.network.forward_features(images))  # type: ignore[operator]

    def as_map(self, features: Tensor) -> Tensor:
        """Features as the network lays them out -> (B, D, h, w); class and register tokens stand before the grid's."""
        if features.dim() == 3 and self.grid[0]:
            rows, columns = self.grid
            return features[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        return features.permute(0, 3, 1, 2) if self.layout == "nhwc" else features


class PoseNetwork(nn.Module):
    """Images (B, C, H, W) to heat maps (B, K, h, w) of K key points; `made` says how its head was, as plain values."""

    def __init__(self, features: FeatureMap, head: nn.Sequential, made: dict[str, Any]) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.made = made
        self.pretrained_cfg: dict[str, Any] = getattr(features.network, "pretrained_cfg", None) or {}

    @property
    def backbone(self) -> nn.Module:
        """The network that the maps are made from."""
        return self.features.network

    @property
    def maps(self) -> str:
        """The name of the convolution that gives the maps."""
        return f"head.{len(self.head) - 1}"

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def with_pose_head(
    network: nn.Module,
    keypoints: int,
    input_size: tuple[int, int, int],
    *,
    head: Head = "deconv",
    width: int | None = None,
    stride: int = STRIDE,
) -> PoseNetwork:
    """The network's backbone with a head of `keypoints` maps at about one pixel to `stride` of the image.

    `head` doubles the map by deconvolutions or, `upsample`, by repeating pixels and convolving, which every runtime has
    in int8. Its `width` is 64, or the backbone's where that is less. NetworkError for a network that is not timm's.
    """
    if not callable(getattr(network, "forward_features", None)) or not callable(
        getattr(network, "reset_classifier", 0)
    ):
        raise NetworkError(
            f"{type(network).__name__} has no forward_features; a head of heat maps is built on timm's networks. "
            "Choose a --model of timm, or give a network of your own that returns heat maps."
        )
    training = network.training
    features = FeatureMap(network.eval(), input_size)
    own = input_size[1] / features.size[0]
    doublings = max(0, round(math.log2(own / stride)))
    width = min(WIDTH, features.width) if width is None else width
    layers = _head(head, features.width, width, doublings, keypoints)
    return PoseNetwork(features, layers, {"head": head, "width": width}).train(training)


def _head(kind: Head, inputs: int, width: int, doublings: int, keypoints: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(doublings):
        layers += [*_double(kind, width if i else inputs, width), nn.BatchNorm2d(width), nn.ReLU()]
    layers.append(nn.Conv2d(width if doublings else inputs, keypoints, 1))
    for layer in layers:
        if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d)):
            nn.init.normal_(layer.weight, std=0.001)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _double(kind: Head, inputs: int, width: int) -> list[nn.Module]:
    if kind == "deconv":
        return [nn.ConvTranspose2d(inputs, width, 4, 2, 1, bias=False)]
    return [nn.Upsample(scale_factor=2.0), nn.Conv2d(inputs, width, 3, padding=1, bias=False)]


def _drop_unused(network: nn.Module, called: set[str]) -> None:
    """Put an Identity in the place of what the feature map does not need: its weights would get no gradient."""
    for name, module in list(network.named_modules()):
        inside = [other for other in called if other == name or other.startswith(f"{name}.")]
        if name and not inside and next(module.parameters(), None) is not None:
            parent, _, key = name.rpartition(".")
            setattr(network.get_submodule(parent), key, nn.Identity())


def _grid(network: nn.Module, tokens: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of the patches among so many tokens; NetworkError where they are no grid of this shape."""
    embed: Any = getattr(network, "patch_embed", None)
    own = getattr(embed, "grid_size", None)
    before = int(getattr(network, "num_prefix_tokens", 0))
    if own and tokens - before == own[0] * own[1]:
        return tuple(own)
    columns = round(math.sqrt((tokens - before) / aspect))
    rows = round(columns * aspect)
    if rows * columns != tokens - before:
        raise NetworkError(
            f"{type(network).__name__} gives {tokens} tokens, which are no grid of the image's shape. Choose another "
            "--model, such as one of convolutions."
        )
    return rows, columns
