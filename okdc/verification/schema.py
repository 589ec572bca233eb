"""verification.json, version 4: what its fields are called, their types and units, for all who write and read it.

Plain dictionaries, as they are in the file; the names and types of their keys are checked wherever they are used.
Whoever adds, removes or renames a field raises `VERSION`. Shares are per cent, times milliseconds, sizes megabytes.
"""

from __future__ import annotations

from typing import Any, TypedDict

VERSION = 4


class Latency(TypedDict):
    """One batch size of one runner, warmed up and in a process of its own; p50_ms to p99_ms are of the wall clock."""

    batch: int
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    images_per_second: float
    cpu_ms: float  # processor time, p50
    samples: int
    contended: bool | None  # others had the processor meanwhile; None where that cannot be told


class Difference(TypedDict):
    """How far the logits are from torch's at one batch size."""

    batch: int
    max_abs: float
    mean_abs: float


class Scores(TypedDict, total=False):
    """What a runner's outputs are worth beside the labels: those of its task alone; None: not measured."""

    top1: float | None  # classify
    top5: float | None
    map: float | None  # multilabel: mean average precision
    # pose, whose names are no identifiers: "pck@0.1" and "pck@0.05"


def score(row: Figures | Row, name: str) -> float | None:
    """A score of a row by its name; None where it was not measured."""
    found: float | None = row.get(name)  # type: ignore[assignment]
    return found


class Figures(Scores):
    """What a runner's outputs are worth beside the labels and torch's outputs; None: not measured."""

    agreement: float | None  # with torch
    ties: int  # disagreements that rounding explains, counted as agreement
    max_abs: float | None
    mean_abs: float | None
    rel: float | None  # max_abs over the largest logit
    differences: list[Difference]


_Verdict = TypedDict("_Verdict", {"pass": bool})  # a word of Python's own


class Row(Figures, _Verdict):
    """One runner: the student in torch, an exported file, or predict.py on raw images."""

    name: str
    file: str | None
    mb: float | None
    provider: str | None  # the backend that really ran
    runtime: str | None  # what runs it, where that was asked for beside the file's own backend: "OpenVINO, bf16"
    precision: str | None  # what it is judged as: fp32, fp16, bf16, int8
    layers: dict[str, int] | None  # multiplying layers by the number type found in the file
    latency: list[Latency]
    worth_shipping: bool | None  # None: made for another device
    reason: str | None


class Recommended(TypedDict):
    """The one file to run on this device."""

    name: str
    file: str
    runtime: str | None  # as in its row
    why: str


class Skipped(TypedDict):
    """What was asked for and could not be done here."""

    target: str
    reason: str


class DataFacts(TypedDict):
    """The validation images, and how many of all images could not be read, by split and class."""

    name: str | None
    images: int
    unreadable: dict[str, dict[str, int]]


class Sample(TypedDict):
    """Which of the validation images were looked at, where not all were asked for."""

    of: int  # images that there are
    seed: int
    by_class: bool  # each class has its share; False: their labels were not known before, and places were drawn
    per_class: list[int]  # the fewest and the most images of a class
    told: str  # the same in words


class Calibration(TypedDict):
    """The training images that int8 was calibrated on."""

    images: int
    seed: int
    sha256: str
    augmented: bool  # as they come in training, where raw images are not to be had
    also_validated: int | None  # training images left out for being validation images too; None: cannot be told


class _OfExport(TypedDict, total=False):
    """What `okdc export` knows and `okdc verify` does not."""

    exports: dict[str, dict[str, Any]]  # what each writer notes, such as the layers left in float
    calibration: Calibration | None
    parameters: int  # of the student; after fusing: exports.onnx.parameters


class _OfTask(TypedDict, total=False):
    """What a verification of another task than classification says beside what others do."""

    task: str


class Verification(_OfExport, _OfTask):
    """The whole file."""

    schema_version: int
    verdict: str  # pass, fail, or parity_only: there were no labelled images
    recommended: Recommended | None
    images: int
    sample: Sample | None  # None: all validation images
    device: str
    threads: int
    rows: list[Row]
    skipped: list[Skipped]
    environment: dict[str, Any]
    data: DataFacts
