"""Which files a student can be written to: what asks for each, writing them into a bundle, finding them in one."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from okdc.deploy import bundle, triton
from okdc.recipe import ExportSettings
from okdc.system import shipped
from okdc.system.wording import one_line, without_paths
from okdc.verification import Exported, Gates
from okdc.verification.gates import GPU_ROWS
from okdc.verification.schema import Skipped

# The settings that ask for an export target, all of them, where that is not the one of its name. Engines are built
# from the ONNX of their precision: --trt --fp16 is model.engine and model.fp16.engine.
_FLAGS = {
    "onnx_fp16": ("fp16",), "onnx_int8": ("int8",), "onnx_int8_trt": ("int8",),
    "tensorrt": ("trt",), "tensorrt_fp16": ("trt", "fp16"), "tensorrt_int8": ("trt", "int8"),
}  # fmt: skip
_LARGEST_BATCH = 32  # that an engine takes, and a server may put together, unless larger ones are asked for
_ROWS = {"torch": "torch.export"}  # where the name of a row is not: "torch" is the reference


def flags(name: str) -> tuple[str, ...]:
    """The settings that together ask for an export target."""
    return _FLAGS.get(name, (name,))


def row_name(name: str) -> str:
    """What the row of an export target is called in a verification."""
    return _ROWS.get(name, name)


def write(
    part: Path,
    student: nn.Module,
    arch: str,
    settings: ExportSettings,
    classes: Sequence[str],
    preprocess: dict,
    info: Mapping[str, Any],
    calibration: np.ndarray | None,
    without: str,
) -> tuple[dict[str, Exported], list[Skipped], dict[str, Any]]:
    """Every file that is asked for, in `part`: the files, what is not available here, and each writer's notes.

    without: why there is no int8 where there is no `calibration`.
    """
    enough = min(100.0, Gates(min_agreement=settings.min_agreement).agreement("int8") + 2)
    metadata = bundle.metadata(arch, classes, preprocess, info)
    example = torch.zeros(2, *preprocess["input_size"])
    largest = max([_LARGEST_BATCH, *settings.batch_sizes])
    targets: dict[str, Exported] = {}
    skipped: list[Skipped] = []
    notes: dict[str, Any] = {}
    for name in shipped.targets():
        if not _wanted(name, settings):
            continue
        module = shipped.target(name)
        wants_images = calibration is None and "int8" in flags(name)
        reason = without if wants_images else module.available()
        if reason is not None:
            skipped.append({"target": name, "reason": without_paths(reason)})
            continue
        # A writer takes what it has a keyword for; among that, the files written so far (TensorRT builds on the ONNX).
        written = {done: exported.path for done, exported in targets.items() if exported.problem is None}
        offered = {"opset": settings.opset, "metadata": metadata, "profile": (1, 8, largest), **written}
        offered |= {"workspace": int(settings.workspace * 2**30), "calibration": calibration, "enough": enough}
        options = {key: offered[key] for key in inspect.signature(module.write).parameters if key in offered}
        problem = None
        try:
            notes[name] = module.write(student, example, part / module.FILE, **options)
        except Exception as error:  # an exporter may raise anything; the other files are still written
            problem = f"it could not be written: {one_line(error)}"
        targets[row_name(name)] = Exported(part / module.FILE, module, problem)
    if any(name.startswith("onnx") for name in targets):
        shutil.copyfile(shipped.folder("export") / "predict.py", part / "predict.py")
        (part / "requirements.txt").write_text("numpy\npillow\nonnxruntime>=1.22\n", encoding="utf-8")
    if settings.trt:  # it builds the engine where it cannot be built here
        shutil.copyfile(shipped.targets()["tensorrt"], part / "to_tensorrt.py")
    if settings.triton:
        triton.write(part, without_paths(arch), preprocess["input_size"], classes, largest)
    return targets, skipped, notes


def further(targets: Mapping[str, Exported]) -> dict[str, Exported]:
    """onnxruntime's providers for GPUs, where there is one: further runners of the same model.onnx."""
    onnx = targets.get("onnx")
    if onnx is None or onnx.problem or not torch.cuda.is_available():
        return {}
    tf32 = {"tensorrt": 5e-3}  # this provider cannot be told to do without
    return {row: replace(onnx, device=device, tolerance=tf32.get(device)) for row, device in GPU_ROWS.items()}


def existing(folder: Path) -> tuple[dict[str, Exported], list[Skipped]]:
    """The files that a bundle has, and why some of them cannot be run here."""
    targets: dict[str, Exported] = {}
    skipped: list[Skipped] = []
    for name in shipped.targets():
        module = shipped.target(name)
        if (folder / module.FILE).is_file():
            reason = module.available()
            if reason is None:
                targets[row_name(name)] = Exported(folder / module.FILE, module)
            else:
                skipped.append({"target": name, "reason": without_paths(reason)})
    return targets, skipped


def _wanted(name: str, settings: ExportSettings) -> bool:
    asked = all(getattr(settings, flag, False) for flag in flags(name))
    return asked or (name == "onnx" and (settings.trt or settings.triton))  # from which those are made
