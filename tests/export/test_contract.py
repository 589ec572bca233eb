"""Every export target keeps the contract of export/README.md: it stands alone, its constants, three functions."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import fields

import pytest

from okdc.deploy import runtimes, targets
from okdc.recipe import ExportSettings
from okdc.verification.gates import DEFAULTS

CONSTANTS = {
    "FILE", "DESCRIPTION", "ALSO", "TOOL", "ASKED_BY", "NEEDS", "ROW", "PRECISION", "TOLERANCE", "MADE_FOR",
    "CALIBRATED", "PREDICT", "RAW", "DEVICES", "LATENCY", "PACKAGES", "RUNS_ON",
    "BESIDE",
}  # fmt: skip
TARGETS, RUNTIMES = targets.known(), runtimes.known()


def imported(nodes) -> set[str]:
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.partition(".")[0] for name in names}


def test_the_targets_are_found():
    assert set(TARGETS) >= {"onnx", "onnx_fp16", "onnx_int8", "onnx_int8_trt", "tensorrt", "tensorrt_fp16", "torch"}


@pytest.mark.parametrize("found", [*TARGETS.values(), *RUNTIMES.values()], ids=lambda found: found.path.stem)
def test_stands_alone(found):
    tree = ast.parse(found.path.read_text())
    assert imported(tree.body) <= set(sys.stdlib_module_names)  # the rest is imported where it is used
    assert "okdc" not in imported(list(ast.walk(tree)))


@pytest.mark.parametrize("name", TARGETS)
def test_its_constants_and_three_functions(name):
    target = targets.find(name)
    module = target.module
    assert {key for key in vars(module) if key.isupper() and not key.startswith(("_", "TYPE_"))} <= CONSTANTS
    assert target.asked_by and set(target.asked_by) <= {field.name for field in fields(ExportSettings)}
    assert target.precision in DEFAULTS and set(target.needs) <= target.options.keys()
    assert all(what and name.startswith("model.") for name, what in target.files.items())
    own = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    assert {key for key in own if not key.startswith("_")} == {"available", "write", "runner"}
    assert module.FILE.startswith("model.")
    assert list(inspect.signature(module.available).parameters) == []
    assert list(inspect.signature(module.write).parameters)[:3] == ["student", "example", "path"]
    runner = inspect.signature(module.runner).parameters
    assert list(runner)[:3] == ["path", "device", "threads"]
    assert (runner["device"].default, runner["threads"].default) == ("cpu", None)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_has_a_name_and_three_functions(name):
    module = RUNTIMES[name].module
    constants = [key for key in vars(module) if key.isupper() and not key.startswith(("_", "TYPE_"))]
    assert constants[0] == "NAME" and set(constants) <= {"NAME", "DEVICE", "TOLERANCE"}
    own = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    assert {key for key in own if not key.startswith("_")} == {"available", "precisions", "runner"}
    runner = inspect.signature(module.runner).parameters
    assert list(runner) == ["path", "device", "threads", "precision"]
    assert [each.default for each in runner.values()][1:] == [RUNTIMES[name].device, None, "fp32"]
