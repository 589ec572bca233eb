"""How a network is trained on: which parts learn nothing, and what is computed again rather than kept."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from okdc.errors import NetworkError, first_line, nearest


def freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Let the modules `names` learn nothing and stay in evaluation mode; NetworkError for a name that is none.

    Branches of the network have them frozen too, with its weights; peers of another architecture do not. NetworkError
    also where nothing is left that learns.
    """
    known = {name: module for name, module in network.named_modules() if name}
    for name in names:
        if name not in known:
            outermost = ", ".join(child for child, _ in network.named_children())
            raise NetworkError(
                f"--freeze {name}: {type(network).__name__} has no module of that name.{nearest(name, known)} "
                f"Its outermost modules are {outermost}."
            )
    for name in names:
        known[name].requires_grad_(False).eval()
    if names and not any(parameter.requires_grad for parameter in network.parameters()):
        raise NetworkError(f"--freeze {','.join(names)} leaves nothing of the network to train. Freeze less of it.")


def checkpoint_gradients(network: nn.Module) -> None:
    """Let the network compute its blocks again in the backward pass, by timm's switch; NetworkError where it cannot."""
    switch = getattr(network, "set_grad_checkpointing", None)
    why = f"{type(network).__name__} has no set_grad_checkpointing, as most networks of timm have"
    try:
        if switch is not None:
            switch(True)
            return
    except (AssertionError, NotImplementedError) as error:
        why = f"{type(network).__name__} says: {first_line(error)}"
    raise NetworkError(
        f"--grad-checkpointing: {why}. Leave it out; a smaller "
        "--batch-size with --grad-accum-steps needs less memory, too."
    )


def keep_activations(network: nn.Module) -> None:
    """Turn that off again, in whatever part of the network it is on."""
    for module in network.modules():
        if getattr(module, "grad_checkpointing", False):
            module.grad_checkpointing = False  # type: ignore[assignment]
