"""Which layers are the classifiers: one rule, for a network that was run and for one that was not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import nn

from okdc.anatomy.calls import Call

LAYERS = (nn.Linear, nn.Conv2d)


def classifiers(network: nn.Module, calls: Sequence[Call] | None = None, num_classes: int | None = None) -> list[str]:
    """Names of the layers that end in class scores, the one that counts first; empty if the network has none.

    Of each part that the network states to be a classifier, or of the whole network if it states none, the Linear layer
    or convolution that is called last, of those that give `num_classes`; registered last, if there are no `calls`.
    """
    modules = dict(network.named_modules())
    if calls is None:
        layers = [name for name, module in modules.items() if isinstance(module, LAYERS)]
    else:
        layers = _that_give(num_classes, [c for c in calls if isinstance(modules[c.name], LAYERS)], modules)
    if states_none(network):
        return []
    ends = [[name for name in layers if modules[name] in set(part.modules())][-1:] for part in stated(network)]
    return list(dict.fromkeys(chain(*ends))) or layers[-1:]


def states_none(network: nn.Module) -> bool:
    """Whether the network itself says that it was made without a classifier."""
    return bool(parts := stated(network)) and all(isinstance(part, nn.Identity) for part in parts)


def _that_give(num_classes: int | None, calls: Sequence[Call], modules: dict[str, nn.Module]) -> list[str]:
    """The layers that give so many numbers for an image, in the order of their calls."""
    names = [c.name for c in calls if c.output and c.output[0] == num_classes]
    if names:
        return names
    # One that is applied to each token, of which the logits are then taken (CLIP's pooling).
    return [
        c.name for c in calls if c.output and c.output[-1] == num_classes and isinstance(modules[c.name], nn.Linear)
    ]


def stated(network: nn.Module) -> list[nn.Module]:
    """What the network itself says is its classifier, as timm's do, the one that counts first."""
    getter = getattr(network, "get_classifier", None)
    own = getter() if callable(getter) else None
    parts: list[object] = []
    for head in own if isinstance(own, (tuple, list)) else [own]:  # a distilled one: the class token's comes first
        parts += reversed(head) if isinstance(head, nn.ModuleList) else [head]  # of several depths the deepest is last
    modules = dict(network.named_modules())
    named = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
    parts += [modules.get(name) for name in ([named] if isinstance(named, str) else named)]
    return [part for part in parts if isinstance(part, nn.Module)]
