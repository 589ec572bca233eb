"""The trunk: which modules it has, and how a copy of the network runs on what was recorded of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.anatomy.modes import unchanged
from okdc.cohort.replay import Replay, Tape


def before(target: nn.Module, anatomy: Anatomy, cut: str) -> dict[str, nn.Module]:
    """The outermost modules all of whose calls end before the cut; modules called on both sides stay in the branch."""
    anatomy.find_cut(cut)
    moment = next(c.end for c in anatomy.calls if c.name == cut)
    last: dict[str, int] = {}
    for call in anatomy.calls:
        last[call.name] = max(last.get(call.name, 0), call.end)
    names = {module: name for name, module in target.named_modules()}
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module) -> None:
        for child in module.children():
            finished = all(last.get(names[m], 0) <= moment for m in child.modules())
            if finished and names[child] in last:
                found[names[child]] = child
            else:
                walk(child)

    walk(target)
    return found


def stand_in(network: nn.Module, trunk: dict[str, nn.Module], tape: Tape, cut: str) -> None:
    """Put a `Replay` in the place (every place) of each trunk module of a copy of the target that parts at `cut`.

    timm's gradient checkpointing is turned off in it: when it computes again, what is replayed is gone.
    """
    for module in network.modules():
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False  # type: ignore[assignment]
    doomed = {network.get_submodule(name): name for name in trunk}
    for module in list(network.modules()):
        for key, child in module._modules.items():
            if child in doomed:
                module._modules[key] = Replay(tape, doomed[child], trunk[doomed[child]], cut)


def on_its_own(member: nn.Module) -> nn.Module:
    """A copy of a member that owes nothing to its cohort: trunk modules where it had replays, no hooks, no tape."""
    network = copy.deepcopy(member)  # a replay's copy has brought a copy of the module that it stands for
    while any(isinstance(module, Replay) for module in network.modules()):  # a parent's trunk is replayed, too
        for module in list(network.modules()):
            for key, child in module._modules.items():
                if isinstance(child, Replay):
                    module._modules[key] = child._original[0]
    network.zero_grad()
    return network


def tie_unused(network: nn.Module, lineage: Sequence[nn.Module], tape: Tape, example: Tensor) -> None:
    """Point what a branch still has but never uses (position embeddings before the cut) to the target's parameters.

    `lineage` is what runs before the branch: the target, then the branches from which it parts.
    """
    with ExitStack() as trial, torch.enable_grad():
        for each in (*lineage, network):
            trial.enter_context(unchanged(each))
            each.eval()
        tape.start()
        for each in lineage:
            each(example)
            tape.rewind()
        logits = all_of(network(example))
        tape.clear()
        named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(logits.sum(), [p for _, p in named], allow_unused=True) if named else ()
    own = dict(lineage[0].named_parameters())
    for (name, _), grad in zip(named, grads, strict=True):
        if grad is None and name in own:
            parent, _, leaf = name.rpartition(".")
            network.get_submodule(parent)._parameters[leaf] = own[name]


def all_of(said: Any) -> Tensor:
    """What a network returned, as one tensor: of several outputs all are proved and learn."""
    return said if isinstance(said, Tensor) else torch.cat([each.flatten(1) for each in said], 1)
