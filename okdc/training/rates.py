"""Learning rates of their own: of the target's layers, and of what the other members have for themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from okdc.errors import RecipeError
from okdc.recipe import TrainSettings

if TYPE_CHECKING:
    from okdc.methods import Method

Group = dict[str, Any]


def scaled(groups: list[Group], method: Method, settings: TrainSettings) -> list[Group]:
    """A method's parameter groups, each in one part for each `lr_scale`, by which timm's schedules multiply the rate.

    The method's own modules keep the plain rate. RecipeError for a target that does not state its layers.
    """
    if settings.layer_decay is None and settings.branch_lr_scale == 1:
        return groups
    target = method.cohort.target
    own = method.cohort.branches.parameters()
    scales: dict[Tensor, float] = dict.fromkeys(own, settings.branch_lr_scale)
    scales |= dict.fromkeys(target.parameters(), 1.0)  # also those that branches have of it
    if settings.layer_decay is not None:
        scales |= _of_layers(target, settings.layer_decay)
    parts: list[Group] = []
    for group in groups:
        by_scale: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            by_scale.setdefault(scales.get(parameter, 1.0), []).append(parameter)
        parts += [{**group, "params": part, "lr_scale": scale} for scale, part in by_scale.items()]
    return parts


def _of_layers(target: nn.Module, decay: float) -> dict[Tensor, float]:
    """`decay` to the power of the layers that come after, for every parameter of a network that learns; as timm's."""
    if not hasattr(target, "group_matcher"):
        raise RecipeError(
            f"--layer-decay needs the order of the network's layers, which timm's networks state (group_matcher) and "
            f"{type(target).__name__} does not. Leave it out, or train the network of that kind that timm has."
        )
    groups = param_groups_layer_decay(target, layer_decay=decay)
    return {parameter: group["lr_scale"] for group in groups for parameter in group["params"]}


def plain(group: Group) -> float:
    """The learning rate of a group without its `lr_scale`."""
    return group["lr"] / group.get("lr_scale", 1.0)
