"""Making a block that changes its input's shape keep it: stride one, and as many channels in as come out."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

Layer = nn.Conv2d | nn.Linear | nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm


class Reprojected(nn.Module):
    """A block that adds channels (dense connections), followed by the projection of old and new ones to the old width.

    x (B, D, H, W) -> conv1x1([x, block(x)]) (B, D, H, W), or conv1x1(block(x)) where the block `joins` them itself.
    `listed` blocks take the list [x].
    """

    def __init__(self, block: nn.Module, width: int, more: int, joins: bool, listed: bool) -> None:
        super().__init__()
        self.block = block
        self.joins, self.listed = joins, listed
        self.project = nn.Conv2d(more if joins else width + more, width, 1, bias=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.block([x] if self.listed else x, *args, **kwargs)
        return self.project(y if self.joins else torch.cat([x, y], 1))


def refit(block: nn.Module, x: Tensor, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """A copy of `block` that takes x, the stage's output, and gives its shape again; None where that cannot be made.

    `args` and `kwargs` are what the block is called with where it stands; x takes the place of the first. Layers that
    meet another number of channels than they were made for are made anew, strides become 1, pooling of the shortcut is
    left out. That it works is tried on x, not assumed.
    """
    if not isinstance(x, Tensor):
        return None
    kwargs = kwargs or {}
    listed = bool(args) and isinstance(args[0], list)
    made = copy.deepcopy(block)
    _stay_in_place(made)
    for name in {"in_channels", "in_chs"} & vars(made).keys():  # a shortcut for as many channels
        setattr(made, name, x.shape[1])
    handles = [m.register_forward_pre_hook(_take) for m in made.modules() if isinstance(m, Layer)]
    try:
        with torch.no_grad():
            y = made.eval()([x] if listed else x, *args[1:], **kwargs)
    except Exception:  # whatever a stranger's forward raises: it cannot be refitted
        return None
    finally:
        for handle in handles:
            handle.remove()
    made.train(block.training)
    if not isinstance(y, Tensor) or y.dim() != x.dim():
        return None
    if y.shape == x.shape and not listed:
        return made
    if x.dim() == 4 and y.shape[2:] == x.shape[2:]:
        joins = y.shape[1] > x.shape[1]  # what came in is among what comes out
        return Reprojected(made, x.shape[1], y.shape[1], joins, listed).to(x.device, x.dtype)
    return None


def _stay_in_place(block: nn.Module) -> None:
    """Every convolution with stride 1 and padding that keeps the size; no pooling that makes the map smaller."""
    for module in list(block.modules()):
        for key, child in module.named_children():
            if "Pool" in type(child).__name__ and max(_pair(getattr(child, "stride", 1))) > 1:
                module._modules[key] = nn.Identity()
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1:
            module.stride = (1, 1)
            if not isinstance(module.padding, str) and all(k % 2 for k in module.kernel_size):
                module.padding = tuple(d * (k - 1) // 2 for k, d in zip(module.kernel_size, module.dilation))  # type: ignore[assignment]


def _pair(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value or 1,)


def _take(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Make a layer anew that is about to be given another number of channels than it was made for."""
    x = args[0]
    if isinstance(layer, nn.Conv2d):
        if x.shape[1] != layer.in_channels:
            _widen_convolution(layer, x.shape[1])
    elif isinstance(layer, nn.Linear):
        if x.shape[-1] != layer.in_features:
            layer.weight = _redrawn(layer.weight, (layer.out_features, x.shape[-1]))
            layer.in_features = x.shape[-1]
    elif isinstance(layer, nn.LayerNorm):
        channels = x.shape[1] if x.dim() == 4 and x.shape[-1] != layer.normalized_shape[-1] else x.shape[-1]
        if (channels,) != layer.normalized_shape:
            layer.normalized_shape = (channels,)
            _resize(layer, channels)
    elif isinstance(layer, nn.GroupNorm):
        if x.shape[1] != layer.num_channels:
            layer.num_channels, layer.num_groups = x.shape[1], math.gcd(x.shape[1], layer.num_groups)
            _resize(layer, x.shape[1])
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and x.shape[1] != layer.num_features:
        layer.num_features = x.shape[1]
        _resize(layer, x.shape[1])


def _widen_convolution(layer: nn.Conv2d, channels: int) -> None:
    if layer.groups == layer.in_channels:  # one filter per channel stays that
        layer.out_channels = channels * (layer.out_channels // layer.in_channels)
        layer.groups = channels
    else:
        layer.groups = math.gcd(layer.groups, channels)
    shape = (layer.out_channels, channels // layer.groups, *layer.kernel_size)
    if "weight" not in layer._parameters:
        raise TypeError("the weight is computed from others (weight norm), which have the old shape")
    layer.weight = _redrawn(layer.weight, shape)
    if layer.bias is not None:
        layer.bias = _redrawn(layer.bias, (layer.out_channels,))
    layer.in_channels = channels


def _resize(layer: nn.Module, channels: int) -> None:
    """Norm layers: every tensor of one value per channel, at the values of a new layer."""
    for key, parameter in layer._parameters.items():
        if parameter is not None:
            fresh = parameter.detach().mean().expand(channels).clone()
            layer._parameters[key] = nn.Parameter(fresh, parameter.requires_grad)
    for key, buffer in layer._buffers.items():
        if buffer is not None and buffer.dim():
            layer._buffers[key] = buffer.mean().expand(channels).clone()


def _redrawn(old: Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    """Weights of another shape and the same mean; their spread follows the number of inputs as when they were new."""
    inputs = math.prod(old.shape[1:]), math.prod(shape[1:])
    spread = old.detach().float().std() * math.sqrt(max(1, inputs[0]) / max(1, inputs[1])) if old.numel() > 1 else 0.0
    fresh = torch.randn(shape, device=old.device) * spread + old.detach().float().mean()
    return nn.Parameter(fresh.to(old.dtype), old.requires_grad)
