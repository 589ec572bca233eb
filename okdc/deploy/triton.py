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
  {{
    name: "input"
    data_type: TYPE_FP32
    dims: [ {dims} ]
  }}
]
output [
  {{
    name: "logits"
    data_type: TYPE_FP32
    dims: [ {classes} ]
    label_filename: "labels.txt"
  }}
]
dynamic_batching {{
  max_queue_delay_microseconds: {delay}
}}
"""


def write(folder: Path, arch: str, input_size: Sequence[int], classes: Sequence[str], largest: int) -> None:
    """Write `folder`/triton: a model of each file that Triton can serve, whose images (C, H, W) it puts together.

    The batch of the graphs is free up to `largest`, which is also what an engine of the bundle was built for.
    """
    name = re.sub(r"\W+", "_", arch).strip("_")
    served = (
        (name, "onnxruntime_onnx", "model.onnx", "model.onnx"),
        (f"{name}_tensorrt", "tensorrt_plan", "model.engine", "model.plan"),
    )
    for model, platform, source, file in served:
        if not (folder / source).is_file():
            continue
        place = folder / FOLDER / model
        (place / "1").mkdir(parents=True)
        shutil.copyfile(folder / source, place / "1" / file)
        write_labels(place / LABELS, classes)
        dims = ", ".join(map(str, input_size))
        facts = {"name": model, "platform": platform, "largest": largest, "dims": dims}
        config = _CONFIG.format(**facts, classes=len(classes), delay=_QUEUE_DELAY)
        (place / "config.pbtxt").write_text(config, encoding="utf-8")
