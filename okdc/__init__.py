"""okdc: train a vision network together with branches that teach it, ship it alone, exported and verified."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# The public surface; each name is imported when first used, so that `import okdc` does not import torch.
_PUBLIC = {
    "compress": "okdc.pipeline",
    "compare": "okdc.comparing",
    "Comparison": "okdc.comparing",
    "export": "okdc.pipeline",
    "Result": "okdc.pipeline",
    "inspect": "okdc.pipeline",
    "Anatomy": "okdc.anatomy",
    "Cohort": "okdc.cohort",
    "Branch": "okdc.cohort",
    "CohortOutput": "okdc.cohort",
    "Method": "okdc.methods",
    "Needs": "okdc.needs",
    "build": "okdc.methods",
    "Recipe": "okdc.recipe",
    "OkdcError": "okdc.errors",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'okdc' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
