"""An export of a network that is not trained yet, so that one which cannot be exported is not trained in vain."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from okdc import networks, tasks
from okdc.deploy import targets
from okdc.errors import ExportError
from okdc.recipe import ExportSettings
from okdc.system.randomness import own_randomness
from okdc.system.wording import all_lines, one_line
from okdc.tasks.task import Task


def refuse_unexportable(
    network: nn.Module, input_size: tuple[int, int, int], settings: ExportSettings, task: Task | None = None
) -> None:
    """Raise ExportError where `settings` ask for ONNX, or what is made of it, and `network` cannot be written to it.

    input_size: (C, H, W). All that the exporters said is on stderr then.
    """
    onnx = targets.find("onnx")
    wanted = any(target.name == onnx.name or onnx.name in target.options for target in targets.asked(settings))
    if not wanted or onnx.module.available() is not None:
        return
    try:
        with tempfile.TemporaryDirectory() as folder, own_randomness():
            network = networks.single(network, input_size, task or tasks.get())
            onnx.module.write(network, torch.zeros(2, *input_size), Path(folder) / onnx.file, opset=settings.opset)
    except Exception as error:  # exporters raise anything
        whole = all_lines(error)
        if whole != one_line(error):
            print(whole, file=sys.stderr)
        raise ExportError(
            f"{one_line(error)}. Tried before training, as nothing asked for could ship after it. Mend the network, or "
            "train without ONNX: --no-onnx (onnx=False)."
        ) from error
