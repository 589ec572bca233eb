"""Methods by name, file or class: `ahbf`, `package.module:MyMethod`, `./my_file.py:MyMethod`, or the class itself."""

from __future__ import annotations

import inspect
import os
import pkgutil
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from okdc.errors import RecipeError, nearest
from okdc.methods.shared.base import Method
from okdc.tasks.task import Task

_FOLDER = Path(__file__).parents[1]
_PACKAGE = __name__.rpartition(".shared.")[0]
_WAYS = "package.module:Class of a module that is installed or in this folder, or path/to/file.py:Class"

_given: dict[str, type[Method]] = {}  # classes that came as such, by the name that a recipe has for them


def names() -> list[str]:
    """The methods that ship with okdc."""
    return sorted(m.name for m in pkgutil.iter_modules([str(_FOLDER)]) if not m.ispkg)


def name_of(method: str | type[Method]) -> str:
    """What recipes call a method, which may be given as its class; `get` gives that class from then on."""
    if isinstance(method, str):
        return method
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise RecipeError(f"method is {method!r}; expected a name, a file.py:Class, or a subclass of okdc.Method.")
    package, _, short = method.__module__.rpartition(".")
    if package == _PACKAGE and short in names():
        return short
    place, file = method.__module__, getattr(sys.modules.get(method.__module__), "__file__", None)
    if place == "__main__" and file:  # a script, from which another process can import it
        path = Path(file).resolve()
        place = path.name if path.parent == Path.cwd() else str(path)
    name = f"{place}:{method.__qualname__}"
    _given[name] = method
    return name


def get(name: str) -> type[Method]:
    """The class of a method by its name; RecipeError with the nearest names.

    A file needs no class after it where it has one method alone.
    """
    if name in _given:
        return _given[name]
    place, class_name = (name, "") if name.endswith(".py") else name.rpartition(":")[::2]
    if not place:
        place, class_name = class_name, ""
    try:
        module = _module(place, bool(class_name))
        found = getattr(module, class_name, None) if class_name else _only_method(module, name)
    except ImportError as error:
        raise RecipeError(f"method {name!r} cannot be imported: {error}. Expected {_WAYS}.") from error
    if found is None:
        known = [each.__name__ for each in _methods_of(module)]
        there = f"It has {', '.join(known)}." if known else "It has no method."
        raise RecipeError(
            f"method {name!r}: {place} has no {class_name}.{nearest(class_name, known)} {there} Expected {_WAYS}."
        )
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise RecipeError(f"{name!r} is not a method: expected a subclass of okdc.Method, got {found!r}.")
    return found


def settings(name: str) -> inspect.Signature:
    """The settings of a method: its constructor's keywords, without `self` and what okdc itself gives it."""
    kind = get(name)
    signature = inspect.signature(kind.__init__, eval_str=True)
    given = {"self", "cohort", "train_labels", *(["teacher"] if kind.needs_teacher else [])}
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.name not in given])


def refuse_settings(name: str, given: Mapping[str, Any]) -> None:
    """RecipeError for a setting that a method does not have, or a word that is none of a setting's choices."""
    known, kind = settings(name).parameters, get(name).__name__
    for key, value in given.items():
        if key not in known:
            has = nearest(key, list(known)) or f" It has {', '.join(known) or 'none'}."
            raise RecipeError(f"{kind} has no setting {key!r}.{has}")
        choices = get_args(known[key].annotation) if get_origin(known[key].annotation) is Literal else (value,)
        if value not in choices:
            raise RecipeError(f"{kind}: {key} was {value!r}; expected one of {', '.join(map(str, choices))}.")


def card(name: str) -> str:
    """What a method is, where it comes from, how it differs, what it costs: the docstring of its file, or its own.

    In a file of several methods a method's own docstring comes first.
    """
    kind = get(name)
    module = sys.modules[kind.__module__]
    texts = [module.__doc__, kind.__doc__]
    if len(_methods_of(module)) > 1:
        texts.reverse()
    documented = inspect.cleandoc(next(filter(None, texts), "")).strip()
    return documented or f"{kind.__name__} has no docstring."


def refuse_task(name: str, task: Task) -> None:
    """RecipeError for a method that does not serve the task."""
    kind = get(name)
    if task.name in kind.tasks:
        return
    others = ", ".join(each for each in names() if task.name in get(each).tasks)
    raise RecipeError(
        f"{name} is no method for --task {task.name}: its losses are made for {' and '.join(kind.tasks)}. "
        f"Those for {task.name}: {others}."
    )


def _module(place: str, own: bool) -> ModuleType:
    """The module of a name of okdc's, of a file, or, where it is somebody's `own`, of a dotted name."""
    if place.endswith(".py"):
        return _of_file(Path(place))
    if not own and place not in names():
        raise RecipeError(
            f"there is no method {place!r}.{nearest(place, names())} Known: {', '.join(names())}; one of your own is "
            "package.module:Class or path/to/file.py:Class."
        )
    if own and not {"", os.getcwd()} & set(sys.path):  # the okdc script, unlike python -m, does not look here
        sys.path.append(os.getcwd())
    return import_module(place if own else f"{_PACKAGE}.{place}")


def _of_file(file: Path) -> ModuleType:
    """The module in a file, imported by its name, so that its neighbours can be imported as from a script."""
    if not file.is_file():
        raise RecipeError(f"there is no file {file} in {Path.cwd()}: give the path of the file with the method.")
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.append(folder)
    module = import_module(file.stem)
    known = getattr(module, "__file__", None)
    if known is None or Path(known).resolve() != file.resolve():
        raise RecipeError(
            f"{file} cannot be imported: another module is called {file.stem} ({known or 'built in'}). Rename the file."
        )
    return module


def _methods_of(module: ModuleType) -> list[type[Method]]:
    own = (v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Method))
    return [kind for kind in own if kind.__module__ == module.__name__]


def _only_method(module: ModuleType, name: str) -> type[Method]:
    own = _methods_of(module)
    if len(own) == 1:
        return own[0]
    if not own:
        raise RecipeError(f"{name} has no method: expected a class that is a subclass of okdc.Method.")
    listed = " and ".join(kind.__name__ for kind in own)
    raise RecipeError(f"{name} has {len(own)} methods, {listed}. Say which one: {name}:{own[0].__name__}.")
