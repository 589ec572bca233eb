"""Files that ship beside the package: `recipes/` and `export/` of a checkout, or the copies of them inside a wheel."""

from __future__ import annotations

import ast
import importlib.util
import sys
import zlib
from functools import cache
from pathlib import Path
from types import ModuleType

from okdc.errors import OkdcError

_PACKAGE = Path(__file__).resolve().parents[1]


def folder(name: str) -> Path:
    """The folder `recipes` or `export`; raises OkdcError if this installation has none."""
    places = [_PACKAGE / "_data" / name]  # where pyproject's force-include puts it in a wheel
    if (_PACKAGE.parent / "pyproject.toml").is_file():  # a checkout, not somebody else's package called `export`
        places.append(_PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise OkdcError(f"This installation of okdc has no {name}/ folder: pip install --force-reinstall okdc")


@cache
def load(path: Path) -> ModuleType:
    """The module in one shipped file, loaded by its path and only once; files beside it are those of its package."""
    name = f"{_package(path.parent)}.{path.stem}"
    if name not in sys.modules:  # else one beside it has imported it
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up here
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@cache
def _package(folder: Path) -> str:
    """The name of a package that is a folder, whatever else of these names can be imported."""
    package = ModuleType(f"okdc_shipped_{zlib.crc32(bytes(folder)):08x}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    return package.__name__


@cache
def load_program(path: Path) -> ModuleType:
    """The same of a program that may import from a file beside it."""
    module = ModuleType(f"okdc_shipped_{path.stem}")
    sys.modules[module.__name__] = module
    exec(compile(program(path), str(path), "exec"), vars(module))
    return module


def program(path: Path) -> str:
    """The text of a program that stands alone: what it imports from a file beside it takes the place of the import."""
    text = path.read_text(encoding="utf-8")
    body = ast.parse(text).body
    for node in body:
        if isinstance(node, ast.ImportFrom) and (other := path.with_name(f"{node.module}.py")).is_file():
            wanted = {alias.name for alias in node.names}
            text = text.replace(_lines(text, node), _needed(other, wanted, set().union(*map(_bound, body)) - wanted))
    return text


def _needed(path: Path, names: set[str], known: set[str]) -> str:
    """The statements of a file that define these names, and what those refer to that is not known, in its order."""
    text = path.read_text(encoding="utf-8")
    nodes, taken = ast.parse(text).body, set[ast.stmt]()
    while new := {node for node in nodes if _bound(node) & (names - known)} - taken:
        taken |= new
        names = names | {each.id for node in new for each in ast.walk(node) if isinstance(each, ast.Name)}
    imports, rest = [], []
    for node in (node for node in nodes if node in taken):
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [alias for alias in node.names if alias.name in names - known]
            imports.append(ast.unparse(node))
        else:
            rest.append("\n\n" * isinstance(node, ast.FunctionDef | ast.ClassDef) + _lines(text, node))
    return "\n".join([*imports, "", *rest])


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement of a module defines or imports."""
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.name for alias in node.names}
    return {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()


def _lines(text: str, node: ast.stmt) -> str:
    """A statement, with what is said behind it."""
    return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
