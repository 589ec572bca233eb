"""Values that the Tab key completes, found in files: importing the methods takes seconds, and so does timm."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from okdc import recipe
from okdc.system import shipped

Names = Callable[[click.Context, click.Parameter, str], list[str]]
Complete = Names | Callable[[click.Context, click.Parameter, str], list[str] | list[CompletionItem]]

_PACKAGE = Path(__file__).parents[1]
# What timm and torchvision call their networks: a function below a decorator, which may name it.
_REGISTERED = re.compile(r'^@register_model(?:\((?:name="(\w+)")?\))?\n(?:@.*\n)*def (\w+)\(', re.MULTILINE)


def complete_method(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """The methods that begin so, by their files."""
    return _begin(begun, (file.stem for file in (_PACKAGE / "methods").glob("[a-z]*.py")))


def complete_task(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """The tasks that begin so, by their files."""
    return _begin(begun, (file.stem for file in (_PACKAGE / "tasks").glob("[a-z]*.py") if file.stem != "task"))


def complete_recipe(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """The recipes that begin so."""
    return _begin(begun, recipe.names())


def complete_model(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """The networks that begin so, by what timm, torchvision and okdc register in their files."""
    own = re.findall(
        r'^    "(\w+_cifar)": \(', (_PACKAGE / "networks" / "cifar.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    torchvision = (f"torchvision/{name}" for name in _registered("torchvision"))
    return _begin(begun, [*own, *_registered("timm"), *torchvision])


def complete_runtime(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """The runtimes that begin so, by their files."""
    files = shipped.folder("export").glob("run_*.py")
    return _begin(begun, ["auto", *(file.stem.removeprefix("run_") for file in files)])


def complete_path(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Files and folders, which the shell itself completes."""
    return [CompletionItem(begun, type="file")]


def or_path(names: Names) -> Complete:
    """The names that begin so or, where none does, files and folders."""

    def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[str] | list[CompletionItem]:
        return names(ctx, param, begun) or complete_path(ctx, param, begun)

    return complete


def several(names: Names) -> Names:
    """The same for the last of several values with commas between them."""

    def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
        before, comma, name = begun.rpartition(",")
        return [f"{before}{comma}{found}" for found in names(ctx, param, name)]

    return complete


def _registered(package: str) -> list[str]:
    """The networks in the files of an installed package, which is not imported."""
    found = importlib.util.find_spec(package)
    places = found.submodule_search_locations if found else None
    files = [file for place in places or [] for file in Path(place, "models").glob("*.py")]
    named = (match for file in files for match in _REGISTERED.findall(file.read_text(encoding="utf-8")))
    return [given or function for given, function in named]


def _begin(begun: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(begun))


OF_SETTING: dict[str, Complete] = {
    "model": or_path(complete_model),
    "teacher": or_path(complete_model),
    "peers": several(complete_model),
    "task": complete_task,
    "data": complete_path,
    "checkpoint": complete_path,
    "runtimes": several(complete_runtime),
}
