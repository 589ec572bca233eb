"""Parts of a network that do not learn."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from okdc.errors import NetworkError, nearest


def freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Let the modules `names` learn nothing and stay in evaluation mode; NetworkError for a name that is none.

    Members that are copies of the network have them frozen too; newly made ones, of random weights, do not.
    NetworkError also where nothing is left that learns.
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
