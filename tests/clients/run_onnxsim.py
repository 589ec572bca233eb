"""What onnxsim makes of a file, run by onnxruntime."""

from __future__ import annotations

import importlib.util

NAME = "onnxsim"


def available():
    return None if importlib.util.find_spec("onnxsim") else "not installed: pip install onnxsim"


def runner(path, device="cpu", threads=None):
    import onnx
    import onnxruntime
    import onnxsim

    model, _ = onnxsim.simplify(onnx.load(path))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(images):
        return session.run(None, {"input": images})[0]

    run.provider = onnxsim.__version__
    return run
