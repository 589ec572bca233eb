"""Strict reading of settings: YAML that cannot run code, exact types, every mistake found at once; no torch."""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Mapping
from dataclasses import Field, dataclass
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from okdc.errors import RecipeError


@dataclass(frozen=True)
class Limits:
    """What a value must be beyond its type; bounds are inclusive but for `above`."""

    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    length: int | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with one value, or None."""
        if value is None:
            return None
        for each in value if isinstance(value, list) else [value]:
            if self.choices and each not in self.choices:
                return f"expected one of {', '.join(self.choices)}, got {each!r}"
        if self.length is not None and len(value) != self.length:
            return f"expected {self.length} values, got {len(value)}"
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if self.above is not None and number <= self.above:
                return f"expected more than {self.above:g}, got {number!r}"
            if self.at_least is not None and number < self.at_least:
                return f"expected at least {self.at_least:g}, got {number!r}"
            if self.at_most is not None and number > self.at_most:
                return f"expected at most {self.at_most:g}, got {number!r}"
        return None


def limits(setting: Field[Any]) -> Limits:
    return setting.metadata.get("limits") or Limits()


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number (YAML 1.1 calls it a string) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"{twice} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


# On and off are words (--resident on), as in YAML 1.2; in 1.1 they are true and false.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if first not in "oO" or tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse(text: str, where: str) -> Any:
    """The plain values (mappings, lists, text, numbers) in `text`; raises RecipeError naming `where`."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: no tag can name a Python object
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{where}{line} is not plain YAML: {reason}.") from error


def read_value(value: Any, annotation: Any) -> tuple[Any, str | None]:
    """`value` as `annotation` wants it (an int where a float is due becomes one), and what is wrong with it or None."""
    if annotation in (Any, inspect.Parameter.empty) or isinstance(annotation, str):
        return value, None
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        results = [read_value(value, argument) for argument in arguments]
        fits = [fitted for fitted, problem in results if problem is None]
        return (fits[0], None) if fits else (value, _expected(annotation, value))
    if origin is Literal:
        return value, None if value in arguments else f"expected one of {', '.join(map(str, arguments))}, got {value!r}"
    if origin in (list, tuple):
        return _read_list(value, annotation, arguments)
    if annotation is float and type(value) in (int, float) and math.isfinite(value):
        return float(value), None
    wanted = type(None) if annotation is None else origin or annotation
    return value, None if type(value) is wanted and annotation is not float else _expected(annotation, value)


def _read_list(value: Any, annotation: Any, arguments: tuple[Any, ...]) -> tuple[Any, str | None]:
    if not isinstance(value, (list, tuple)):
        return value, _expected(annotation, value)
    results = [read_value(element, arguments[0] if arguments else Any) for element in value]
    for index, (_, problem) in enumerate(results):
        if problem:
            return value, f"element {index + 1}: {problem}"
    return [element for element, _ in results], None


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "key: value pairs"}


def _word(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_word(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"a list of {_word(arguments[0]).removeprefix('a ')}s" if arguments else "a list"
    if annotation in (None, type(None)):
        return "null"
    return _WORDS.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))


def _expected(annotation: Any, value: Any) -> str:
    given = "null" if value is None else f"{value!r}"
    kind = "" if value is None else f" ({_word(type(value)).removeprefix('a ')})"
    return f"expected {_word(annotation)}, got {given}{kind}"


def raise_mistakes(source: str, mistakes: list[str]) -> None:
    """Raise one RecipeError with all the mistakes, if there are any."""
    if len(mistakes) == 1:
        raise RecipeError(f"{source}: {mistakes[0]}{'' if mistakes[0][-1] in '.?' else '.'}")
    if mistakes:
        listed = "".join(f"\n  {mistake}" for mistake in mistakes)
        raise RecipeError(f"{source} has {len(mistakes)} mistakes:{listed}")


def text_keys(raw: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in raw.items()}
