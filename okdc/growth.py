"""How a branch comes to differ from the target: deeper by further blocks, and born with weights of its own."""

from __future__ import annotations

import torch
from torch import nn

from okdc.anatomy import Anatomy
from okdc.depth import deepen
from okdc.stages import Stage

PERTURBATION = 0.1  # noise of a pre-trained branch, as a share of each weight tensor's own spread


def grow(network: nn.Module, anatomy: Anatomy, stage: Stage, count: int, pretrained: bool = False) -> str:
    """Append `count` newly born blocks to one stage of a sibling of the target, and say which: its own or okdc's."""
    words, blocks = deepen(network, anatomy, stage, count)
    for block in blocks:
        born(block, pretrained)
    return words


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
