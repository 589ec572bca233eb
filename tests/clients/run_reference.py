"""onnx's own evaluator, which computes each operator as the standard describes it, in numpy."""

from __future__ import annotations

import importlib.util

NAME = "onnx's reference evaluator"


def available():
    return None if importlib.util.find_spec("onnx") else "onnx is not installed: pip install onnx"


def runner(path, device="cpu", threads=None):
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))

    def run(images):
        return evaluator.run(None, {"input": images})[0]

    run.provider = onnx.__version__
    return run
