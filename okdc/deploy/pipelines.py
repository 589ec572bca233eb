"""What of a bundle takes raw images: predict.py, and files with the preprocessing inside; run as the rows of both.

The code that runs is okdc's own, of which the bundle's is a copy: no code of a bundle is ever run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from okdc import tasks
from okdc.deploy import bundle, statement
from okdc.deploy.targets import Target, known
from okdc.system import shipped
from okdc.verification import Exported, Pipeline
from okdc.verification.comparison import PIPELINE_TOLERANCE
from okdc.verification.schema import Skipped, Verification

_PREDICT = "predict.py"


def split(folder: Path, exported: Mapping[str, Exported]) -> tuple[dict[str, Exported], dict[str, Pipeline]]:
    """The files that take the input of the network, and what takes raw images, both by their rows."""
    raw = {target.row: target for target in known().values() if target.raw}
    inside = {row: _inside(folder, raw[row]) for row, file in exported.items() if row in raw and not file.problem}
    return {row: file for row, file in exported.items() if row not in inside}, inside | _predict(folder)


def unchecked(folder: Path, pipelines: Mapping[str, Pipeline], verification: Verification) -> list[Skipped]:
    """A "skipped" entry for each that was not tried, as there were no raw images."""
    if not bundle.is_known(statement.read_preprocess(folder)):
        return [{"target": _PREDICT, "reason": statement.UNKNOWN}]
    reason = "there are no raw validation images, so the preprocessing it does was not compared with that of training"
    tried = {row["file"] for row in verification["rows"]}
    files = [*(getattr(each, "path", folder / _PREDICT).name for each in pipelines.values()), _PREDICT]
    here = [name for name in dict.fromkeys(files) if (folder / name).is_file()]
    return [{"target": name, "reason": reason} for name in here if name not in tried]


def _program(folder: Path) -> str:
    """The file of export/ that is the predict.py of a bundle's task."""
    return tasks.of(bundle.read_config(folder).get("okdc", {})).program


def _module(program: str = _PREDICT) -> ModuleType:
    return shipped.load_program(shipped.folder("export") / program)


def _predict(folder: Path) -> dict[str, Pipeline]:
    """predict.py, where the bundle has it and a file that it runs: float32 if it is there.

    That shows its preprocessing to the last prediction; the other files are compared without it.
    """
    fit = [target for target in known().values() if target.predict and (folder / target.file).exists()]
    if not ((folder / _PREDICT).is_file() and fit):
        return {}
    target = min(fit, key=lambda target: target.precision != "fp32")
    # Loaded when first run, so that its errors become its row's.
    predictor = functools.cache(lambda: _module(_program(folder)).load(folder, model=target.file))

    def pipeline(images: Sequence[Any]) -> np.ndarray:
        return predictor().logits(images)

    pipeline.precision = target.precision  # type: ignore[attr-defined]
    return {_PREDICT: pipeline}


def _inside(folder: Path, target: Target) -> Pipeline:
    """A file with the preprocessing inside, on images that are decoded as predict.py does it, one at a time."""

    @functools.cache
    def run() -> Callable[[np.ndarray], np.ndarray]:
        return target.module.runner(folder / target.file)

    config = statement.read_preprocess(folder)

    def pipeline(images: Sequence[Any]) -> np.ndarray:
        pixels = [np.asarray(_module().decoded(image, config)) for image in images]
        return np.concatenate([run()(each.reshape(1, *each.shape[:2], -1)) for each in pixels])

    pipeline.path, pipeline.precision = folder / target.file, target.precision  # type: ignore[attr-defined]
    # A pixel that another resizing rounds to its neighbour may turn over what is this close.
    pipeline.ties = PIPELINE_TOLERANCE  # type: ignore[attr-defined]
    return pipeline
