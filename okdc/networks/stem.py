"""Another stem for small images, other channels for torchvision's networks; the network keeps a note of the change."""

from __future__ import annotations

import math
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from okdc.anatomy import Call
from okdc.anatomy.calls import watch
from okdc.errors import NetworkError

Changes = dict[str, dict[str, Any] | None]  # module name: what a convolution gets; None: it becomes nn.Identity

STEM = 5  # convolutions: MobileNet's and EfficientNet's fifth is the second that halves the image
KERNEL = 3


def changes(network: nn.Module) -> Changes:
    """What `change` did to a network that its library does not know about; it can be written as json."""
    return getattr(network, "okdc_changes", {})


def change(network: nn.Module, wanted: Changes) -> None:
    """Give convolutions other channels, kernels and strides in place, with their weights, and take modules out."""
    for name, settings in wanted.items():
        if settings is None:
            network.set_submodule(name, nn.Identity())
            continue
        layer = network.get_submodule(name)
        for key, value in settings.items():
            setattr(layer, key, tuple(value) if isinstance(value, (list, tuple)) else value)
        assert isinstance(layer, nn.Conv2d)
        weight = adapt_input_conv(layer.in_channels, layer.weight.detach(), layer.weight.shape[1] * layer.groups)
        layer.weight = nn.Parameter(_centre(weight, layer.kernel_size).contiguous())
    network.okdc_changes = changes(network) | wanted  # type: ignore[assignment]


def _centre(weight: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The middle of every filter, as strong as the whole filter was."""
    if weight.shape[2:] == kernel:
        return weight
    top, left = ((old - new) // 2 for old, new in zip(weight.shape[2:], kernel))
    middle = weight[:, :, top : top + kernel[0], left : left + kernel[1]]
    return middle * (weight.flatten(1).norm(dim=1) / middle.flatten(1).norm(dim=1).clamp_min(1e-12)).view(-1, 1, 1, 1)


def other_channels(network: nn.Module, channels: int) -> Changes:
    """The first convolution takes `channels`; for networks of torchvision, which are made for three."""
    name = next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    if getattr(network, "transform_input", False):
        raise NetworkError(
            f"{type(network).__name__} with pre-trained weights normalises three colours in its forward. Leave "
            "--pretrained out, or take timm's network of that name, which takes any number of channels."
        )
    return {name: {"in_channels": channels}}


def make_small(network: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Change the stem of an ImageNet network for images of `input_size`; NetworkError where that cannot be."""
    change(network, for_small_images(network, input_size))
    try:
        watch(network, next(network.parameters()).new_zeros(2, *input_size))
    except NetworkError as error:
        raise NetworkError(
            f"--small-input: the network does not run with {described(changes(network))}: {error.__cause__ or error}. "
            "Leave --small-input out: smaller images are enlarged to --img-size."
        ) from error


def described(changed: Changes) -> str:
    """What was changed, in words."""
    parts = []
    for name, settings in changed.items():
        if settings is None:
            parts.append(f"{name} is left out")
            continue
        size = "x".join(map(str, settings.get("kernel_size", ())))
        parts.append(f"{name} is {size} with stride 1" if size else f"{name} takes {settings['in_channels']} channels")
    return ", ".join(parts)


def for_small_images(network: nn.Module, input_size: tuple[int, int, int]) -> Changes:
    """What makes an ImageNet network keep the size of its images in its first layers, as CIFAR's versions do.

    Of the first two halvings, as far as the first convolutions (`STEM`) make them, strides become 1, kernels at most
    3x3, and poolings go. Nothing for a network that keeps their size anyway (VGG, the CIFAR networks).
    Raises NetworkError where the stem cuts images into patches, or folds pixels into channels.
    """
    calls, side = _leaves(network, input_size)
    found: Changes = {}
    for level in (0, 1):
        halving = [c for c in calls if _halvings(c.input, side) == level < _halvings(c.output, side)]
        before = sum(_is_conv(network, c) for c in calls if halving and c.end < halving[0].start)
        new = {call.name: _without_stride(network, call, input_size[-1]) for call in halving if before < STEM}
        if not new or not (found or any(new.values())):  # poolings alone, such as VGG's, are no stem
            break
        found |= new
    return found


def _leaves(network: nn.Module, input_size: tuple[int, int, int]) -> tuple[list[Call], int]:
    """Calls of innermost modules on maps of more than a pixel, as they start, and the side of the images, pixels."""
    channels, *small = input_size
    weight = next(network.parameters())
    for scale in (4, 1):  # an ImageNet network may not run on small images before its stem is changed
        try:
            calls, _ = watch(network, weight.new_zeros(2, channels, *(scale * side for side in small)))
            break
        except NetworkError:
            if scale == 1:
                raise
    leaves = [c for c in calls if c.leaf and len(c.input or ()) == len(c.output or ()) == 3]
    maps = [c for c in leaves if c.input[-1] > 1 and (c.output[-1] > 1 or _is_conv(network, c))]  # type: ignore[index]
    return sorted(maps, key=lambda c: c.start), scale * small[-1]


def _halvings(shape: tuple[int, ...] | None, side: int) -> int:
    """How often an image of this side was halved to become this map."""
    return round(math.log2(side / shape[-1]))  # type: ignore[index]


def _is_conv(network: nn.Module, call: Call) -> bool:
    return isinstance(network.get_submodule(call.name), nn.Conv2d)


def _without_stride(network: nn.Module, call: Call, side: int) -> dict[str, Any] | None:
    layer, name = network.get_submodule(call.name), type(network).__name__
    assert call.input and call.output
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and isinstance(layer.padding, tuple):
        if layer.kernel_size > (1, 1) and layer.kernel_size <= layer.stride:
            typed = f"--model-kwargs patch_size={max(1, layer.kernel_size[0] // 4)} --img-size {side}"
            raise NetworkError(
                f"--small-input: {name} cuts its images into patches of {layer.kernel_size[0]} pixels ({call.name}), "
                f"which no other stride makes smaller. Type {typed} instead, where the network has a patch size."
            )
        kernel, padding = (
            [min(size, most) for size in sizes] for sizes, most in ((layer.kernel_size, KERNEL), (layer.padding, 1))
        )
        return {"kernel_size": kernel, "stride": [1, 1], "padding": padding}
    if next(layer.parameters(), None) is None and call.input[0] == call.output[0]:
        return None
    raise NetworkError(
        f"--small-input: {call.name} of {name}, a {type(layer).__name__}, makes its images smaller in a way that has "
        "no stride to change. Leave --small-input out: images are enlarged with --img-size."
    )
