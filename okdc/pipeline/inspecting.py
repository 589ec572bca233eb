"""`okdc.inspect`: the anatomy of a network, or of what a name makes."""

from __future__ import annotations

from torch import Tensor, nn

from okdc import anatomy, networks
from okdc.anatomy import Anatomy
from okdc.recipe import NetworkSettings


def inspect(
    network: str | nn.Module, example: Tensor | tuple[int, ...] | None = None, *, logits_only: bool = False
) -> Anatomy:
    """Run a network once on `example` (B, C, H, W), or on noise of that (C, H, W) shape, and describe what it did.

    network: a name, as for `okdc.compress`, or a module, which is left as it was. Without an example the images have
    the size that the network states, else 3x224x224. NetworkError if it does not give one (B, classes) tensor, and if
    it has no stages, feature map or classifier, unless its logits are all that is needed (`logits_only`).
    """
    if isinstance(network, str):
        settings = NetworkSettings(model=network)
        network = networks.load(settings)
        example = networks.data_config(network, settings)["input_size"] if example is None else example
    return anatomy.inspect(network, example, logits_only=logits_only)
