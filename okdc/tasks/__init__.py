"""What a network is for: what its outputs and labels are, what teaches them and what scores them; a file a task.

Found by their file names, as methods are; what a task may say is the class `Task` in `task`, the rest of `shared/` what
they are made of. Only here and in `methods` and `losses` is it known what a class is.

Imports: `errors`, `losses`, `ranks`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from okdc.errors import RecipeError, nearest

if TYPE_CHECKING:
    from okdc.tasks.task import Task

DEFAULT = "classify"


def names() -> list[str]:
    """The tasks that there are."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and m.name != "task")


def get(name: str = DEFAULT, noted: Mapping[str, Any] | None = None) -> Task:
    """A task by its name, with what a run or a bundle notes (`Task.facts`); RecipeError with the nearest names."""
    if name not in names():
        raise RecipeError(f"there is no task {name!r}.{nearest(name, names())} Known: {', '.join(names())}.")
    made: Task = import_module(f"{__name__}.{name}").TASK(noted or {})
    return made


def of(noted: Mapping[str, Any]) -> Task:
    """The task that a run or a bundle notes; where it notes none, DEFAULT."""
    return get(noted.get("task") or DEFAULT, noted)


def metric(recipe: Any) -> str:
    """What picks the best epoch of a run: what its recipe says, else the task's own."""
    return recipe.train.eval_metric or get(recipe.network.task).metric
