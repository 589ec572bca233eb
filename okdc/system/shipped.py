"""Files that ship beside the package: `recipes/` and `export/` of a checkout, or the copies of them inside a wheel."""

from __future__ import annotations

import importlib.util
import sys
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
    """The module in one shipped file, loaded by its path and only once."""
    name = f"okdc_shipped_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module
