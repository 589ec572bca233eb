"""Run a network on trial and leave it as it was: modes, buffers, gradients, random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from okdc.system.randomness import random_state, set_random_state


def keep_modes(network: nn.Module) -> Callable[[], None]:
    """A function that puts every module back into the mode, training or evaluation, in which it is now."""
    training = [(module, module.training) for module in network.modules()]

    def put_back() -> None:
        for module, mode in training:
            module.training = mode

    return put_back


@contextmanager
def at_rest(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter that requires a gradient: torch's FLOP counter trips over those."""
    put_back = keep_modes(network)
    trained = [p for p in network.parameters() if p.requires_grad]
    fused_attention = torch.backends.mha.get_fastpath_enabled()  # which nobody counts
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        network.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)
        put_back()
        for parameter in trained:
            parameter.requires_grad_(True)


def resting(network: nn.Module) -> list[nn.Module]:
    """The modules that came in evaluation mode and are to stay in it: they learn nothing, and their statistics too.

    All parameters of such a module are frozen. One without parameters counts where somebody put just it into that mode,
    not the network around it.
    """
    found = []
    for parent in network.modules():
        for module in parent.children():
            learns = any(p.requires_grad for p in module.parameters())
            chosen = parent.training or any(True for _ in module.parameters())
            if not module.training and not learns and chosen:
                found.append(module)
    return found


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Run a module on trial: its buffers and modes, and the random numbers, are afterwards what they were."""
    buffers = [(b, b.clone()) for b in module.buffers()]
    put_back, state = keep_modes(module), random_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        put_back()
        set_random_state(state)
