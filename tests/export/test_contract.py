"""Every export target keeps the contract of export/README.md: it stands alone, one constant, three functions."""

from __future__ import annotations

import ast
import inspect
import sys

import pytest

from okdc.system import shipped

TARGETS = shipped.targets()


def imported(nodes) -> set[str]:
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.partition(".")[0] for name in names}


def test_the_targets_are_found():
    assert set(TARGETS) == {
        "onnx", "onnx_fp16", "onnx_int8", "onnx_int8_trt", "tensorrt", "tensorrt_fp16", "tensorrt_int8", "torch"
    }  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_stands_alone(name):
    tree = ast.parse(TARGETS[name].read_text())
    assert imported(tree.body) <= set(sys.stdlib_module_names)  # the rest is imported where it is used
    assert "okdc" not in imported(list(ast.walk(tree)))


@pytest.mark.parametrize("name", TARGETS)
def test_one_constant_and_three_functions(name):
    module = shipped.target(name)
    own = {key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    assert {key for key in own if not key.startswith("_")} == {"available", "write", "runner"}
    assert module.FILE.startswith("model.")
    assert list(inspect.signature(module.available).parameters) == []
    assert list(inspect.signature(module.write).parameters)[:3] == ["student", "example", "path"]
    runner = inspect.signature(module.runner).parameters
    assert list(runner)[:3] == ["path", "device", "threads"]
    assert (runner["device"].default, runner["threads"].default) == ("cpu", None)
