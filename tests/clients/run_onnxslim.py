"""What onnxslim makes of a file, run by onnxruntime."""

from __future__ import annotations

import importlib.util

NAME = "onnxslim"


def available():
    return None if importlib.util.find_spec("onnxslim") else "not installed: pip install onnxslim"


def runner(path, device="cpu", threads=None):
    import onnx
    import onnxruntime
    import onnxslim

    model = onnxslim.slim(onnx.load(path))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(images):
        return session.run(None, {"input": images})[0]

    run.provider = onnxslim.__version__
    return run
