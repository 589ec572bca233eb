"""How a branch comes to differ from the target: deeper or shallower, narrower, and born with weights of its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from okdc.anatomy import Anatomy, Stage
from okdc.anatomy.modes import resting
from okdc.cohort.depth import deepen, shorten
from okdc.cohort.plan import Branch
from okdc.cohort.width import narrow
from okdc.errors import CutError

PERTURBATION = 0.1  # noise of a pre-trained branch, as a share of each weight tensor's own spread


def differ(
    network: nn.Module,
    plan: Branch,
    anatomy: Anatomy,
    trunk: Mapping[str, nn.Module],
    example: Tensor,
    redraw: bool,
    pretrained: bool,
) -> str:
    """Make a sibling of the target as new, deep and wide as was planned; how it differs from the target, in words."""
    stages = anatomy.stages_after(plan.cut) if plan.cut else anatomy.stages
    if redraw:
        born(network, pretrained)
    # Appended blocks first: they may stand after modules that are about to be replaced.
    grown = [grow(network, anatomy, s, n, pretrained) for s, n in zip(stages, plan.extra_blocks) if n]
    if plan.width < 1:
        grown.append(narrow(network, anatomy, plan.cut, trunk, plan.width, example))
    if plan.outputs:
        give_outputs(network, anatomy.classifier, plan.outputs)
        grown.append(f"{plan.outputs} outputs")
    return ", ".join(filter(None, grown))


def give_outputs(network: nn.Module, name: str, outputs: int) -> None:
    """Put a new classifier of so many outputs in the place of the old one; CutError where that is no plain layer."""
    old = network.get_submodule(name)
    new: nn.Module
    if type(old) is nn.Linear:
        new = nn.Linear(old.in_features, outputs, old.bias is not None)
    elif type(old) is nn.Conv2d and set(old.kernel_size) == {1} and old.groups == 1:
        new = nn.Conv2d(old.in_channels, outputs, 1, bias=old.bias is not None)
    else:
        raise CutError(
            f"this method gives each branch a classifier of its own, and {name!r} is a {type(old).__name__}; expected "
            "a Linear layer or a convolution of one pixel. Choose another method (okdc methods)."
        )
    parent, _, last = name.rpartition(".")
    weight = old.weight
    network.get_submodule(parent).register_module(last, new.to(weight.device, weight.dtype))


def grow(network: nn.Module, anatomy: Anatomy, stage: Stage, count: int, pretrained: bool = False) -> str:
    """Append `count` newly born blocks to one stage of a sibling of the target, and say which: its own or okdc's.

    A negative `count` takes so many of the stage's last blocks away.
    """
    if count < 0:
        return shorten(network, stage, -count)
    words, blocks = deepen(network, anatomy, stage, count)
    for block in blocks:
        born(block.requires_grad_(True), pretrained)  # also where the stage that it repeats is frozen
    return words


def born(network: nn.Module, pretrained: bool) -> None:
    """Give a copy weights of its own, drawn from torch's random numbers.

    New networks: each tensor is drawn afresh with the mean and spread that it has, constants stay. Pre-trained ones:
    noise of a tenth of the spread is added. Branches that start equal would stay equal for ever. What rests keeps its
    weights, to which its statistics belong.
    """
    with torch.no_grad():
        kept: set[Tensor] = {parameter for module in resting(network) for parameter in module.parameters()}
        drawn_or_kept = kept | _draw_parametrized(network, pretrained, kept)
        for parameter in network.parameters():
            if parameter not in drawn_or_kept:
                parameter.copy_(_drawn(parameter, pretrained))


def _draw_parametrized(network: nn.Module, pretrained: bool, kept: set[Tensor]) -> set[Tensor]:
    """Draw what parametrizations give (orthogonal weights) by assigning it; the parameters that need no drawing now.

    Those that are to be `kept` are not drawn.
    """
    done: set[Tensor] = set()
    for module in network.modules():
        for name, chain in getattr(module, "parametrizations", {}).items():
            if kept.issuperset(chain.parameters()):
                continue
            try:
                setattr(module, name, _drawn(getattr(module, name), pretrained))
            except (NotImplementedError, RuntimeError, ValueError):  # no way back to the parameters: draw those
                continue
            done |= set(chain.parameters())
    return done


def _drawn(tensor: Tensor, pretrained: bool) -> Tensor:
    if tensor.numel() < 2 or not tensor.is_floating_point():
        return tensor
    spread = tensor.float().std()
    if not spread > 0:
        return tensor
    noise = torch.randn_like(tensor) * spread
    return tensor + noise * PERTURBATION if pretrained else noise + tensor.mean()


def reborn(network: nn.Module) -> nn.Module:
    """A copy with the weights of an untrained network, of one whose maker is not known.

    Every layer draws its own, then the network as a whole where it has `init_weights()`; what neither sets is drawn
    with the mean and spread that it has.
    """
    network = copy.deepcopy(network)
    born(network, pretrained=False)
    for module in network.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    initialise = getattr(network, "init_weights", None)
    if callable(initialise) and all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(initialise).parameters.values()
    ):
        initialise()
    return network
