"""What is compared: one arm for each method, plain training beside them, and plain training for as much compute."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from okdc import methods
from okdc.errors import OkdcError, RecipeError, nearest
from okdc.measure.estimate import Estimate
from okdc.methods import Method
from okdc.pipeline import teachers
from okdc.recipe import Recipe

log = logging.getLogger("okdc")

PLAIN = "baseline"
ALIKE = 1.1  # a control may have so many times the compute of a method and serve it too, instead of one of its own


@dataclass(frozen=True)
class Arm:
    """One line of a comparison: how it is trained, and what it is held against.

    `cost` is what a step takes, in FLOPs forward and backward, as a multiple of the plain one's. `control` names the
    arm of plain training with as much compute. `problem` says why it cannot be trained.
    """

    name: str
    recipe: Recipe
    cost: float = 1.0
    control: str | None = None
    problem: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is plain training, for whatever number of epochs."""
        return self.recipe.method["name"] == PLAIN


def plan(
    names: Sequence[str | type[Method]],
    make: Callable[[str], Recipe],
    measure: Callable[[Recipe], Estimate],
    equal_compute: bool,
) -> list[Arm]:
    """The arms for the methods `names`: plain training first, its longer controls last.

    `make` gives the recipe of a method, `measure` what it would build. A method that either refuses has the reason as
    its problem. RecipeError where a name is no method, or none can be trained.
    """
    plain = Arm(PLAIN, make(PLAIN))
    arms = [_arm(name, plain, make, measure) for name in _chosen(names, plain.recipe.network.task) if name != PLAIN]
    if arms and all(arm.problem for arm in arms):
        told = "\n".join(f"{arm.name}: {arm.problem}" for arm in arms)
        raise RecipeError(f"none of the methods can be compared:\n{told}")
    return [plain, *(_controlled(arms, plain) if equal_compute else arms)]


def _chosen(names: Sequence[str | type[Method]], task: str) -> list[str]:
    """The methods by name, each once; `all` stands for every one of okdc's that serves the task."""
    known = methods.names()
    serving = [name for name in known if task in methods.get(name).tasks]
    every = [name for given in map(methods.name_of, names) for name in (serving if given == "all" else [given])]
    for name in every:
        if ":" not in name and not name.endswith(".py") and name not in known:
            raise RecipeError(f"--methods: no method {name!r}.{nearest(name, known)}")
    return list(dict.fromkeys(every))


def _arm(name: str, plain: Arm, make: Callable[[str], Recipe], measure: Callable[[Recipe], Estimate]) -> Arm:
    try:
        recipe = make(name)
        teachers.check(recipe.cohort, name, methods.get(name).needs_teacher)
        return Arm(name.rpartition(":")[2], recipe, _cost(measure(recipe)))
    except OkdcError as error:
        return replace(plain, name=name, problem=str(error))


def _cost(found: Estimate) -> float:
    """FLOPs of a training step over the plain one's: a backward pass takes two forward ones, and a teacher has none."""
    frozen = sum(each.flops for each in found.networks if each.frozen)
    return (3 * found.flops - 2 * frozen) / (3 * found.networks[0].flops)


def _controlled(arms: list[Arm], plain: Arm) -> list[Arm]:
    """The arms with their controls, then these: plain training for as many epochs more as a step costs more."""
    controls: dict[int, Arm] = {}
    held = []
    epochs = plain.recipe.train.epochs
    for arm in sorted(arms, key=lambda arm: -arm.cost):
        if arm.problem or arm.cost < ALIKE:
            held.append(replace(arm, control=None if arm.problem else plain.name))
            continue
        enough = math.ceil(round(arm.cost * epochs, 6))
        longer = next((count for count in controls if count <= ALIKE * enough), enough)
        controls.setdefault(longer, _longer(plain, longer))
        held.append(replace(arm, control=controls[longer].name))
    in_order = sorted(held, key=lambda arm: [each.name for each in arms].index(arm.name))
    return [*in_order, *(controls[count] for count in sorted(controls))]


def _longer(plain: Arm, epochs: int) -> Arm:
    recipe = replace(plain.recipe, train=replace(plain.recipe.train, epochs=epochs))
    return replace(plain, name=f"{PLAIN}-{epochs}-epochs", recipe=recipe)
