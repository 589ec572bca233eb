"""Recipes: a whole run as plain YAML, read strictly, changed by the command line, written out in full; no torch."""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from okdc.errors import OkdcError, RecipeError, nearest
from okdc.recipe.sections import CohortSettings, DataSettings, ExportSettings, NetworkSettings, TrainSettings
from okdc.recipe.strict import limits, parse, raise_mistakes, read_value, text_keys
from okdc.system import shipped

__all__ = [
    "CohortSettings",
    "DataSettings",
    "ExportSettings",
    "NetworkSettings",
    "Recipe",
    "TrainSettings",
    "load",
    "names",
    "override",
]

# The recipe of `okdc compress` when neither a recipe nor data is given: real images, on any machine, in about a minute.
DEFAULT = "digits/resnet18-ahbf"
# The same of a task that is trained in another way, and what its runs on given data begin with.
OF_TASK = {"pose": ("figures/mobilenetv3_small_050-okdhp", "pose/resnet18-okdhp")}

# The settings of a method by its name: its constructor's keywords, without the cohort.
MethodSettings = Callable[[str], inspect.Signature]


@dataclass(frozen=True)
class Recipe:
    """A whole run; `method` is the method's name and the keywords of its constructor."""

    network: NetworkSettings = field(default_factory=NetworkSettings)
    cohort: CohortSettings = field(default_factory=CohortSettings)
    method: dict[str, Any] = field(default_factory=lambda: {"name": "ahbf"})
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    export: ExportSettings = field(default_factory=ExportSettings)

    @staticmethod
    def from_dict(raw: Any, method_settings: MethodSettings | None = None, *, source: str = "recipe") -> Recipe:
        """The recipe that plain values describe; what they leave out is at its default.

        `method_settings` (okdc.methods.settings) says what a method takes; without it that is not checked.
        Raises RecipeError with every mistake, each by its path such as `train.epochs`.
        """
        if not isinstance(raw, Mapping):
            raise RecipeError(f"{source}: expected the sections {_listed_sections()}, got {raw!r}.")
        mistakes = [
            f"{name}: no such section.{nearest(name, _sections()) or f' There are {_listed_sections()}.'}"
            for name in text_keys(raw)
            if name not in _sections()
        ]
        values: dict[str, Any] = {}
        for name, kind in _sections().items():
            given = raw.get(name)
            given = {} if given is None else given
            if not isinstance(given, Mapping):
                mistakes.append(f"{name}: expected settings below it, such as {_example(kind)}, got {given!r}")
            elif is_dataclass(kind):
                values[name] = _read_section(name, kind, text_keys(given), mistakes)
            else:
                values[name] = _read_method(text_keys(given), method_settings, mistakes)
        raise_mistakes(source, mistakes)
        return Recipe(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain values, in the order of the dataclasses."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The whole recipe as YAML, every default written out; the same recipe always gives the same text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    @property
    def digest(self) -> str:
        """SHA-256 of `to_yaml`, hexadecimal."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


@cache
def _sections() -> dict[str, Any]:
    return get_type_hints(Recipe)


def _listed_sections() -> str:
    return ", ".join(_sections())


@cache
def flat_settings() -> dict[str, tuple[str, Any]]:
    """Section and dataclass field of every setting by its bare name, which no two sections share."""
    return {f.name: (name, f) for name, kind in _sections().items() if is_dataclass(kind) for f in fields(kind)}


def _example(kind: Any) -> str:
    return f"{fields(kind)[0].name}: {fields(kind)[0].default}" if is_dataclass(kind) else "name: ahbf"


def _read_section(name: str, kind: Any, given: dict[str, Any], mistakes: list[str]) -> Any:
    known, hints, values = {f.name: f for f in fields(kind)}, get_type_hints(kind), {}
    for key, value in given.items():
        if key not in known:
            mistakes.append(f"{name}.{key}: no such setting.{_other_place(name, key) or nearest(key, known)}")
            continue
        values[key], problem = read_value(value, hints[key])
        problem = problem or limits(known[key]).problem(values[key])
        if problem:
            mistakes.append(f"{name}.{key}: {problem}")
            del values[key]
    return kind(**values)


def _other_place(section: str, key: str) -> str:
    place = flat_settings().get(key)
    return f" It belongs to {place[0]}." if place and place[0] != section else ""


def _read_method(given: dict[str, Any], signature_of: MethodSettings | None, mistakes: list[str]) -> dict[str, Any]:
    """The method's name and all its settings, bound to the signature."""
    name = given.get("name", Recipe().method["name"])
    if not isinstance(name, str):
        mistakes.append(f"method.name: expected the name of a method, got {name!r}")
        return given
    settings = {key: value for key, value in given.items() if key != "name"}
    if signature_of is None:
        return {"name": name, **settings}
    try:
        parameters = signature_of(name).parameters
    except OkdcError as error:
        mistakes.append(f"method.name: {error}".rstrip("."))
        return given
    for key in settings.keys() - parameters.keys():
        mistakes.append(f"method.{key}: {name} has no such setting.{nearest(key, parameters) or _has(parameters)}")
    values: dict[str, Any] = {"name": name}
    for key, parameter in parameters.items():
        if key not in settings and parameter.default is parameter.empty:
            mistakes.append(f"method.{key}: {name} needs it")
            continue
        values[key], problem = read_value(settings.get(key, parameter.default), parameter.annotation)
        if problem:
            mistakes.append(f"method.{key}: {problem}")
    return values


def _has(parameters: Iterable[str]) -> str:
    return f" It has {', '.join(parameters)}." if parameters else " It has none."


def names() -> list[str]:
    """The recipes that ship with okdc, such as cifar100/resnet32-ahbf."""
    root = shipped.folder("recipes")
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def path(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe or of one's own; raises RecipeError if there is none."""
    own = Path(name_or_path)
    if own.is_file():
        return own
    name = str(name_or_path).removesuffix(".yaml")
    if name in names():
        return shipped.folder("recipes") / f"{name}.yaml"
    known = nearest(name, names()) or " okdc recipes lists them."
    raise RecipeError(f"no recipe {str(name_or_path)!r}, neither a file nor one of okdc's.{known}")


def read(name_or_path: str | Path) -> dict[str, Any]:
    """The plain values in a recipe, unchecked; `Recipe.from_dict` checks them."""
    file = path(name_or_path)
    raw = parse(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(raw, dict):
        raise RecipeError(f"{file}: expected the sections {_listed_sections()}, got {raw!r}.")
    return raw


def load(
    name_or_path: str | Path, method_settings: MethodSettings | None = None, *, typed: Collection[str] | None = ()
) -> Recipe:
    """The recipe of that name or in that file.

    `typed` are the names that the user gave beside it: only those may be `package.module:function`, because a recipe
    from somewhere else must not run code. None is for a caller that will run none of it. Raises RecipeError with every
    mistake.
    """
    raw = read(name_or_path)
    if typed is not None:
        _refuse_code(raw, typed)
    return Recipe.from_dict(raw, method_settings, source=str(name_or_path))


def runs_code(name: str) -> bool:
    """Whether a network or method is named as package.module:function or file.py:Class, which run somebody's Python."""
    if name.endswith(".py") or ".py:" in name:
        return True
    return re.fullmatch(r"[^\W\d]\w+(\.\w+)*:\w+(\.\w+)*", name) is not None and not name.startswith("hf_hub:")


def _refuse_code(raw: Mapping[str, Any], typed: Collection[str]) -> None:
    for flag, name in _code_names(raw):
        if name not in typed:
            raise RecipeError(
                f"the recipe names {name}, which is Python code that a recipe must not run. "
                f"If you trust it, type --{flag} {name}."
            )


def _code_names(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Flag and name of every network and method of unchecked recipe values that runs code."""
    sections = {name: section for name, section in raw.items() if isinstance(section, Mapping)}
    named = [("model", sections.get("network", {}).get("model")), ("method", sections.get("method", {}).get("name"))]
    named.append(("teacher", sections.get("cohort", {}).get("teacher")))
    peers = sections.get("cohort", {}).get("peers")
    named += [("peers", peer) for peer in (peers if isinstance(peers, list) else [])]
    return [(flag, name) for flag, name in named if isinstance(name, str) and runs_code(name)]


def _refuse_unknown(method: str, method_settings: MethodSettings, source: str) -> None:
    """RecipeError for a method that does not exist, by where it was named."""
    try:
        method_settings(method)
    except OkdcError as error:
        raise RecipeError(f"{source}: method: {error}") from error


def override(
    recipe: Recipe,
    flat: Mapping[str, Any],
    method_settings: MethodSettings | None = None,
    *,
    source: str = "settings",
) -> Recipe:
    """The recipe with settings changed by their bare names (epochs=3), `method` (a name) and `method_kwargs`.

    Another method starts from its own defaults, and so do members that are to share nothing (`share`, `peers`): what
    the recipe says of shared layers is not for them. Raises RecipeError with every mistake.
    """
    raw, unknown = recipe.to_dict(), []
    method = flat.get("method") or raw["method"]["name"]
    if method != raw["method"]["name"]:
        raw["method"], raw["cohort"] = {"name": method}, asdict(CohortSettings())
    if flat.get("peers") or flat.get("share") == "none":
        of_branches = ("members", "extra_blocks") if flat.get("peers") else ()
        raw["cohort"].update(dict.fromkeys(("cut", "private_stages", "trunk_gradient", *of_branches)))
    raw["method"].update(flat.get("method_kwargs") or {})
    known = flat_settings()
    for name, value in flat.items():
        if name in known:
            raw[known[name][0]][name] = value
        elif name not in ("method", "method_kwargs"):
            unknown.append(f"{name}: no such setting.{nearest(name, known)}")
    raise_mistakes(source, unknown)
    return Recipe.from_dict(raw, method_settings, source=source)


def apply_sets(raw: Mapping[str, Any], sets: Iterable[str]) -> dict[str, Any]:
    """Plain recipe values with `section.key=value` changes made to them; values are read as YAML reads them."""
    changed = copy.deepcopy(dict(raw))
    for item in sorted(sets, key=lambda item: not item.startswith("method.name=")):
        place, equals, text = item.partition("=")
        *parents, key = place.strip().split(".")
        if not equals or not parents or not key:
            raise RecipeError(f"--set {item}: write section.key=value, such as --set train.epochs=60.")
        section = changed
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise RecipeError(f"--set {item}: {parent} has no settings below it.")
        value = parse(text, f"--set {item}")
        if parents == ["method"] and key == "name" and value != section.get("name"):
            section.clear()  # another method starts from its own defaults
            changed.pop("cohort", None)
        section[key] = value
    return changed


def base(given: Mapping[str, Any]) -> str | None:
    """The recipe that a run begins with where none is named, by what else is; None: the dataclasses' defaults."""
    without, with_data = OF_TASK.get(given.get("task", ""), (DEFAULT, None))
    return with_data if "data" in given else without


def resolve(
    name_or_path: str | Path | None = None,
    *,
    sets: Iterable[str] = (),
    flat: Mapping[str, Any] | None = None,
    method_settings: MethodSettings | None = None,
    source: str = "command line",
) -> Recipe:
    """The recipe of a run: the named one with `sets` (section.key=value), then `flat` (see `override`), applied to it.

    Without a name it starts from DEFAULT, or from the dataclasses' defaults when the changes say which data to use;
    for a task in OF_TASK from one of those.
    Raises RecipeError with every mistake; `source` is where it says that those in `flat` were made.
    """
    flat, sets = {key: value for key, value in (flat or {}).items() if value is not None}, list(sets)
    typed = apply_sets({}, sets)
    if name_or_path is None:
        name_or_path = base({**(typed.get("network") or {}), **(typed.get("data") or {}), **flat})
    raw = read(name_or_path) if name_or_path is not None else {}
    method = flat.get("method")
    if method and method_settings:
        _refuse_unknown(method, method_settings, source)
    if method and method != (raw.get("method") or {}).get("name"):
        raw["method"] = {"name": method}  # before --set, so that method.key means a setting of this method
        raw.pop("cohort", None)  # which was built for the other one
    raw = apply_sets(raw, sets)
    replaced = [name for flag, name in _code_names(raw) if flag in flat]
    _refuse_code(raw, [name for _, name in _code_names(typed)] + replaced)
    origin = f"{name_or_path} with --set" if name_or_path and sets else str(name_or_path or "--set")
    recipe = Recipe.from_dict(raw, method_settings, source=origin)
    return override(recipe, flat, method_settings, source=source)
