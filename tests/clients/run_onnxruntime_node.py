"""onnxruntime-node, the native build for programs in JavaScript, run as run_onnxruntime_web runs the other."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

NAME = "onnxruntime-node"


def available():
    command = ["node", "-e", f"require({NAME!r})"]  # it fails where npm has left out the native part, too
    if shutil.which("node") and subprocess.run(command, capture_output=True, check=False).returncode == 0:
        return None
    return "not installed: npm install onnxruntime-node"


def runner(path, device="cpu", threads=None):
    file = Path(__file__).parents[2] / "export" / "run_onnxruntime_web.py"
    spec = importlib.util.spec_from_file_location("run_onnxruntime_web", file)
    assert spec is not None and spec.loader is not None
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    return shared._Node(NAME, Path(path), threads or 1)
