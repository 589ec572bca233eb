"""Who may import whom: command line, pipeline, parts, maths; read from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "okdc"

# Each module (or folder) of the package and what it may import of okdc; "" is the package itself (its version).
RECIPE = {"errors", "recipe", "settings"}
FREE = (
    "errors",
    "_cifar",
    "_gates",
    "_latency",
    "_memory",
    "_plots",
    "_portable",
    "_ranks",
    "_schema",
    "_tally",
    "_triton",
)
ALLOWED = {
    # maths, and what knows nothing
    **{name: set() for name in FREE},
    "losses": {"_ranks"},
    "__init__": set(),
    # recipes
    "_checking": {"errors"},
    "settings": {"_checking"},
    "_shipped": {"errors"},
    "recipe": {"_checking", "_shipped", "errors", "settings"},
    # networks and cohorts
    "_weights": {"errors"},
    "_torchvision": {"_weights"} | RECIPE,
    "networks": {"_cifar", "_stem", "_torchvision", "_weights", "calls", "checkpoint"} | RECIPE,
    "_stem": {"calls", "errors"},
    "calls": {"errors"},
    "replay": {"errors"},
    "stages": {"calls", "errors"},
    "anatomy": {"calls", "errors", "stages"},
    "refit": set(),
    "depth": {"anatomy", "calls", "refit", "stages"},
    "growth": {"anatomy", "depth", "stages"},
    "narrowing": {"anatomy", "depth", "errors"},
    "sharing": {"anatomy", "calls", "errors", "replay"},
    "cohort": {"anatomy", "calls", "errors", "growth", "narrowing", "replay", "sharing"},
    "needs": set(),
    "methods": {"_ranks", "anatomy", "cohort", "errors", "growth", "losses", "methods", "needs", "replay"},
    # data and training
    "_waiting": {"errors"},
    "data": {"_ranks", "_waiting", "data", "needs"} | RECIPE,
    "checkpoint": {"_ranks", "_waiting", "errors"},
    "_machine": {"_ranks"} | RECIPE,
    "_distributed": {"_machine", "_ranks"} | RECIPE,
    "_progress": {"checkpoint"},
    "_state": {"_machine", "_progress", "_ranks", "checkpoint"} | RECIPE,
    "_stalls": {"_state", "_waiting", "errors"},
    "train": {"_stalls", "_waiting", "_distributed", "_machine", "_progress", "_ranks", "_state", "checkpoint"}
    | RECIPE,
    # export
    "verify": {"_gates", "_schema", "_latency", "_portable", "_shipped", "_tally", "errors"},
    "_bundle": {"", "_stem", "_portable", "_shipped", "errors", "networks", "verify"},
    "_card": {"_bundle", "_gates", "_portable", "_shipped", "_stem"},
    "_calibration": {"_shipped", "errors"},
    "_hub": {"_bundle", "_portable", "errors"},
    "_torch_runner": {"_bundle"},
    "_targets": {"_bundle", "_gates", "_portable", "_shipped", "_triton", "recipe", "verify"},
    "exporting": {"", "_calibration", "_gates", "_targets", "_bundle", "_card", "_portable", "_shipped", "verify"}
    | RECIPE,
    "report": {"_plots", "checkpoint"},
    "examine": {"_shipped", "anatomy", "cohort", "depth", "errors", "networks", "replay", "settings", "sharing"},
    "zoo": {"errors", "examine", "networks"},
    # the steps, and the command line over them
    "_teacher": {"_waiting", "_machine", "checkpoint", "data", "networks"} | RECIPE,
    "runs": {"checkpoint"} | RECIPE,
    "assembly": {"_stem", "_machine", "_ranks", "_teacher", "anatomy", "cohort", "data", "methods", "needs", "networks"}
    | RECIPE,
    "_byproducts": {"calls", "checkpoint", "data", "exporting", "methods"} | RECIPE,
    "pipeline": {
        "",
        "_byproducts",
        "_distributed",
        "_hub",
        "_machine",
        "_ranks",
        "_teacher",
        "assembly",
        "checkpoint",
        "data",
        "exporting",
        "methods",
        "networks",
    }
    | {"report", "runs", "train"}
    | RECIPE,
    "estimate": {"_machine", "_teacher", "assembly", "calls", "cohort", "methods", "needs", "networks", "sharing"}
    | RECIPE,
    "profiling": {"_machine", "_memory", "_state", "assembly", "cohort", "data", "estimate", "methods", "train"}
    | RECIPE,
    "benchmark": {
        "_bundle",
        "_gates",
        "_machine",
        "_portable",
        "_shipped",
        "_targets",
        "data",
        "exporting",
        "networks",
        "pipeline",
        "verify",
    }
    | RECIPE,
    "_flags": {"_checking"} | RECIPE,
    "_summary": {"benchmark", "methods"},
    "cli": {
        "",
        "_distributed",
        "_flags",
        "_summary",
        "anatomy",
        "benchmark",
        "estimate",
        "exporting",
        "methods",
        "networks",
        "pipeline",
        "profiling",
        "runs",
        "zoo",
    }
    | RECIPE,
    "__main__": {"cli"},
}


def room(path: Path) -> str:
    """The module, or the folder of a sub-package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # names for annotations alone are no dependence
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "okdc":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {_name(alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name + ".").split(".")[1] for alias in node.names if alias.name.split(".")[0] == "okdc"}
    return found


def _name(name: str) -> str:
    return name if (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir() else ""


def test_every_import_is_allowed() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert {room(f) for f in files} == set(ALLOWED), "a module came or went: say above what it may import"
    assert len(files) > 30
    wrong = {
        str(f.relative_to(PACKAGE)): sorted(imported(f) - ALLOWED[room(f)])
        for f in files
        if imported(f) - ALLOWED[room(f)]
    }
    assert wrong == {}


def test_methods_do_not_know_each_other() -> None:
    files = [f for f in (PACKAGE / "methods").glob("*.py") if not f.name.startswith("_")]
    assert len(files) >= 3
    for file in files:
        modules = {
            node.module
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("okdc.methods")
        }
        assert all(module.startswith("okdc.methods._") for module in modules), file.name


def test_export_targets_know_nothing_of_okdc() -> None:
    files = sorted((PACKAGE.parent / "export").glob("*.py"))
    assert [f.name for f in files] == [
        "predict.py", "to_onnx.py", "to_onnx_fp16.py", "to_onnx_int8.py", "to_onnx_int8_trt.py", "to_tensorrt.py",
        "to_tensorrt_fp16.py", "to_tensorrt_int8.py", "to_torch.py",
    ]  # fmt: skip
    assert all(not imported(f) for f in files)


def test_importing_okdc_does_not_import_torch() -> None:
    code = "import sys, okdc, okdc.cli, okdc.recipe; print([m for m in ('torch', 'timm', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
