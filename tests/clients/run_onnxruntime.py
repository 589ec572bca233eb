"""onnxruntime from Python, with nothing around it: the one that is found first."""

from __future__ import annotations

import importlib.util

NAME = "onnxruntime"


def available():
    return None if importlib.util.find_spec("onnxruntime") else "not installed: pip install onnxruntime"


def runner(path, device="cpu", threads=None):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images):
        return session.run(None, {"input": images})[0]

    run.provider = f"onnxruntime {onnxruntime.__version__}"
    return run
