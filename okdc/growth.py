"""How a branch comes to differ from the target: deeper by further blocks, and born with weights of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from okdc.anatomy import Anatomy, Stage

PERTURBATION = 0.1  # noise of a pre-trained branch, as a share of each weight tensor's own spread


class Chain(nn.Module):
    """A module followed by further ones; it stands where `first` stood and answers for it."""

    def __init__(self, first: nn.Module, further: list[nn.Module]) -> None:
        super().__init__()
        self.first = first
        self.further = nn.ModuleList(further)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        x = self.first(x, *args, **kwargs)
        for block in self.further:
            x = block(x, *args, **kwargs)
        return x

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("first"), name)


class ResidualConv(nn.Module):
    """The block for networks that have none to repeat: x + bottleneck(x), (B, D, H, W) or (B, H, W, D)."""

    def __init__(self, width: int, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        inner = max(1, width // 4)
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
        )

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.channels_last:
            return x + self.body(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.body(x)


class ResidualMlp(nn.Module):
    """The block for token networks that have none to repeat: x + MLP(norm(x)), (B, N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x + self.body(x)


FALLBACKS = (ResidualConv, ResidualMlp)


def grow(network: nn.Module, anatomy: Anatomy, stage: Stage, count: int, pretrained: bool = False) -> str:
    """Append `count` newly born blocks to one stage of a sibling of the target, and say which: its own or okdc's.

    The network's own last block is copied (same type, same shapes); where the stage pools, this is before the pooling.
    """
    if stage.blocks:
        names = stage.blocks[-1]
        run = [network.get_submodule(name) for name in names]
        blocks: list[nn.Module] = [_copy_run(run) for _ in range(count)]
        kind = "-".join(type(module).__name__ for module in run)
    else:
        names = (stage.last,)
        blocks = [_fallback(anatomy, stage) for _ in range(count)]
        kind = type(blocks[0]).__name__
    for block in blocks:
        born(block, pretrained)
    parent, _, leaf = names[-1].rpartition(".")
    place = network.get_submodule(parent)
    place._modules[leaf] = Chain(network.get_submodule(names[-1]), blocks)
    return f"{count} x {kind} after {names[-1]}"


def _copy_run(run: list[nn.Module]) -> nn.Module:
    return copy.deepcopy(run[0]) if len(run) == 1 else nn.Sequential(*copy.deepcopy(run))


def _fallback(anatomy: Anatomy, stage: Stage) -> nn.Module:
    shape = next(c.output for c in reversed(anatomy.calls) if c.name == stage.last)
    assert shape is not None
    if len(shape) == 2:
        return ResidualMlp(shape[-1])
    channels_last = anatomy.layout == "nhwc"
    return ResidualConv(shape[-1] if channels_last else shape[0], channels_last)


def born(network: nn.Module, pretrained: bool) -> None:
    """Give a copy weights of its own, drawn from torch's random numbers.

    New networks: each tensor is drawn afresh with the mean and spread that it has, constants stay. Pre-trained ones:
    noise of a tenth of the spread is added. Branches that start equal would stay equal for ever.
    """
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() < 2 or not parameter.is_floating_point():
                continue
            spread = parameter.float().std()
            if spread > 0:
                noise = torch.randn_like(parameter) * spread
                if pretrained:
                    parameter.add_(noise * PERTURBATION)
                else:
                    parameter.copy_(noise + parameter.mean())
