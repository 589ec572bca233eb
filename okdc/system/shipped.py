"""Files that ship beside the package: `recipes/` and `export/` of a checkout, or the copies of them inside a wheel."""

from __future__ import annotations

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
