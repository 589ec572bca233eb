"""A model repository for NVIDIA's Triton server, made of the files of a bundle."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from okdc.deploy.statement import LABELS, write_labels

FOLDER = "triton"
NEEDS = ("onnx",)  # the export targets without which there is nothing to serve

_QUEUE_DELAY = 2000  # microseconds that an image waits for others to share its batch
_CONFIG = """\
name: "{name}"
platform: "{platform}"
max_batch_size: {largest}
input [
{inputs}
]
output [
{outputs}
]
dynamic_batching {{
  max_queue_delay_microseconds: {delay}
}}
"""
_TENSOR = """\
  {{
    name: "{name}"
    data_type: {kind}
    dims: [ {dims} ]{more}
  }}"""
_NAMED = '\n    label_filename: "labels.txt"'


def write(folder: Path, arch: str, input_size: Sequence[int], classes: Sequence[str], largest: int) -> None:
    """Write `folder`/triton: a model of each file that Triton can serve, whose images (C, H, W) it puts together.

    The batch of the graphs is free up to `largest`, which is also what an engine of the bundle was built for. What has
    its preprocessing inside takes (H, W, C), of which Triton puts those of one size together.
    """
    name = re.sub(r"\W+", "_", arch).strip("_")
    prepared, logits = _tensor("input", input_size), _tensor("logits", [len(classes)], more=_NAMED)
    raw = _tensor("images", [-1, -1, input_size[0]], "TYPE_UINT8")
    odds = _tensor("probabilities", [len(classes)], more=_NAMED)
    served = (
        (name, "onnxruntime_onnx", "model.onnx", "model.onnx", prepared, logits),
        (f"{name}_tensorrt", "tensorrt_plan", "model.engine", "model.plan", prepared, logits),
        (f"{name}_full", "onnxruntime_onnx", "model.full.onnx", "model.onnx", raw, f"{odds},\n{logits}"),
    )
    for model, platform, source, file, inputs, outputs in served:
        if not (folder / source).is_file():
            continue
        place = folder / FOLDER / model
        (place / "1").mkdir(parents=True)
        shutil.copyfile(folder / source, place / "1" / file)
        write_labels(place / LABELS, classes)
        facts = {"name": model, "platform": platform, "largest": largest, "inputs": inputs, "outputs": outputs}
        (place / "config.pbtxt").write_text(_CONFIG.format(**facts, delay=_QUEUE_DELAY), encoding="utf-8")


def _tensor(name: str, dims: Sequence[int], kind: str = "TYPE_FP32", more: str = "") -> str:
    """An input or an output as a configuration states it."""
    return _TENSOR.format(name=name, kind=kind, dims=", ".join(map(str, dims)), more=more)
