"""The methods: one file each, found by its file name; `package.module:Class` names one from outside okdc.

What a method may say is the class `Method` in `shared/base`.

Imports: `anatomy`, `cohort`, `errors`, `losses`, `needs`, `ranks`, `system`, `tasks`.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
import sys
from importlib import import_module

from okdc.errors import RecipeError, nearest
from okdc.methods.shared.base import Method

__all__ = ["Method", "card", "get", "names", "settings"]


def names() -> list[str]:
    """The methods that ship with okdc."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def get(name: str) -> type[Method]:
    """The class of a method: `ahbf`, or `my_package.my_module:MyMethod`; RecipeError with the nearest names."""
    module_name, _, class_name = name.partition(":")
    if not class_name and name not in names():
        raise RecipeError(
            f"there is no method {name!r}.{nearest(name, names())} "
            f"Known: {', '.join(names())}; one of your own is package.module:Class."
        )
    if class_name and not {"", os.getcwd()} & set(sys.path):  # the okdc script, unlike python -m, does not look here
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name if class_name else f"{__name__}.{name}")
        found = getattr(module, class_name) if class_name else _only_method(module.__name__, vars(module))
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"method {name!r} cannot be imported: {error}. Expected package.module:Class, of a module that is "
            "installed or in this folder."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise RecipeError(f"{name!r} is not a method: expected a subclass of okdc.Method, got {found!r}.")
    return found


def settings(name: str) -> inspect.Signature:
    """The settings of a method: its constructor's keywords, without `self` and what okdc itself gives it."""
    kind = get(name)
    signature = inspect.signature(kind.__init__, eval_str=True)
    given = {"self", "cohort", "train_labels", *(["teacher"] if kind.needs_teacher else [])}
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name not in given])


def card(name: str) -> str:
    """What a method is, where it comes from, how it differs, what it costs: the docstring of its file, or its own."""
    kind = get(name)
    documented = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or kind.__doc__ or "").strip()
    return documented or f"{kind.__name__} has no docstring."


def _only_method(module_name: str, namespace: dict) -> type[Method]:
    own = [
        v for v in namespace.values() if isinstance(v, type) and issubclass(v, Method) and v.__module__ == module_name
    ]
    if len(own) != 1:
        raise AttributeError(f"{module_name} defines {len(own)} methods, expected one")
    return own[0]
