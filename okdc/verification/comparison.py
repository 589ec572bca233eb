"""Every exported file on the same images as torch: scores, agreement, differences of the logits, latency, a verdict.

Torch in fp32 is the reference. A row passes or fails with one sentence; what is measured is always reported.
Shapes: B batch, C classes or channels, H, W pixels.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from okdc import tasks
from okdc.errors import DataError
from okdc.system.saying import say
from okdc.system.wording import one_line, without_paths
from okdc.tasks.shared.tally import Tally
from okdc.tasks.task import Task
from okdc.verification import latency, sample
from okdc.verification.alone import measure_alone
from okdc.verification.gates import NO_WISHES, Gates, chance, fail, follow, judge, verdict, weigh
from okdc.verification.runners import Exported, Pipeline, Run, logits_of, start, torch_runner
from okdc.verification.schema import VERSION, Figures, Latency, Row, Verification, score

TOLERANCE = 1e-4  # largest relative difference of the logits, fp32; an export target may state its own TOLERANCE
ROUNDING = 1e-5  # the same, of one sum added up in another order
PIPELINE_TOLERANCE = 1e-2  # the same for a whole pipeline, whose decoding and resizing of images may round differently
PIPELINE_IMAGES = 1024  # raw images that whole pipelines are run on, one after another: a sample where there are more
RANDOM_IMAGES = 64  # how many stand in for validation images that are not there
_BETWEEN_LINES = 10.0  # seconds between two lines that say how far a long comparison is
PROBED_BATCHES = (1, 3, 32)  # run besides the batches of the data: proves that the batch size is free

Batch = tuple[np.ndarray, np.ndarray | None, list[Any] | None]  # images (B, C, H, W), labels (B, ...), B raw PIL images


def compare(
    student: nn.Module | None,
    targets: Mapping[str, Exported],
    data: Any | None,
    *,
    input_size: Sequence[int],
    device: str = "cpu",
    images: int | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    threads: int = 1,
    gates: Gates = NO_WISHES,
    pipelines: Mapping[str, Pipeline] | None = None,
    golden: tuple[np.ndarray, np.ndarray] | None = None,
    alone: tuple[str, Path] | None = None,
    task: Task | None = None,
) -> Verification:
    """Run every exported file and the student on the same validation images, and judge them: a verification.

    student: None where the network cannot be rebuilt; the files are then held to `gates.expected` and `golden`.
    data: has `validation`, batches of (images, labels) or None, and `validation_images`, (PIL image, label) in the same
    order or None. Without validation data, random images are compared and the verdict is at most "parity_only".
    images: how many of the validation images, drawn as `sample` says; all when None.
    pipelines: judged on raw images, where there are more on `PIPELINE_IMAGES` of them, drawn as `sample` says.
    golden: inputs (B, C, H, W) and the logits (B, C) that they are known to give.
    alone: a module that can run the student in a process of its own, so that torch too is timed there, and its file.
    task: what the outputs are, by default classes.
    "skipped" holds the targets whose own device is not here, "environment" and "data" nothing: only the caller knows.
    """
    task = task or tasks.get()
    session = _Session(student, targets, pipelines or {}, device, task)
    labelled = data is not None and data.validation is not None
    data = sample.take(data, images)
    few = sample.fewer(data, PIPELINE_IMAGES)
    first = session.stream(_batches(data, input_size, raw=bool(pipelines) and few is data))
    if pipelines and few is not data:
        session.stream_raw(_batches(few, input_size, raw=True))
    session.probe(first, golden)
    rows = session.rows(labelled, gates)
    if batch_sizes:
        session.time(rows, first, batch_sizes, threads, alone)
    recommended = weigh(rows, task)
    found: Verification = {
        "schema_version": VERSION,
        "verdict": verdict(rows, labelled, [name for name, each in targets.items() if each.device or each.runtime]),
        "recommended": recommended,
        "images": session.count,
        "sample": sample.described(data, session.labels, task),
        "device": device,
        "threads": threads,
        "rows": rows,
        "skipped": [{"target": name, "reason": reason} for name, reason in session.absent.items()],
        "environment": {},
        "data": {"name": None, "images": 0, "unreadable": {}},
    }
    return found if task.name == tasks.DEFAULT else found | {"task": task.name}


class _Session:
    """The runners of one comparison, their tallies, and why some could not go on."""

    def __init__(
        self,
        student: nn.Module | None,
        targets: Mapping[str, Exported],
        pipelines: Mapping[str, Pipeline],
        device: str,
        task: Task,
    ) -> None:
        self.task = task
        self.student, self.targets, self.pipelines, self.device = student, dict(targets), pipelines, device
        self.reference = torch_runner(student, device) if student is not None else None
        self.runners: dict[str, Run] = {}
        self.providers: dict[str, str] = {}
        self.devices: dict[str, str] = {}
        self.layers: dict[str, dict[str, int]] = {}
        self.problems = {name: exported.problem for name, exported in targets.items() if exported.problem}
        self.tallies = {name: task.tally() for name in ("torch", *targets, *pipelines)}
        self.alike = self.tallies["torch"]  # torch on the images that pipelines are run on
        self.count = 0
        self.labels: list[Any] = []
        self.absent: dict[str, str] = {}
        for name, exported in targets.items():
            if name in self.problems:
                continue
            with self._blame(name, "it cannot be loaded"):
                self.runners[name], self.devices[name] = start(exported, device)
                self.providers[name] = str(getattr(self.runners[name], "provider", ""))
                self.layers[name] = getattr(self.runners[name], "precisions", {})
            if exported.device and name in self.problems:
                self.absent[name] = self.problems[name]
                del self.targets[name]

    @contextlib.contextmanager
    def _blame(self, name: str, what: str) -> Iterator[None]:
        """A backend may raise anything; whatever it is becomes that row's failure, and the other rows go on."""
        try:
            yield
        except Exception as error:
            self.problems.setdefault(name, f"{what}: {one_line(error)}")

    def stream(self, batches: Iterator[Batch]) -> np.ndarray:
        """Give every batch to every runner; returns the images of the first batch."""
        first: np.ndarray | None = None
        files = ", ".join([*self.runners, *self.pipelines]) or "torch"
        say(f"comparing with torch, image by image: {files}")
        told = time.monotonic()
        for images, labels, raw in batches:
            if time.monotonic() - told > _BETWEEN_LINES:
                told = time.monotonic()
                say(f"comparing: {self.count:,} images are done")
            first = images if first is None else first
            self.count += len(images)
            self.labels += labels.tolist() if labels is not None else []
            reference = self.reference(images) if self.reference is not None else None
            if reference is not None:
                self._count("torch", reference, labels, reference)
            for name, run in self.runners.items():
                self._run(name, run, images, labels, reference)
            for name, pipeline in self.pipelines.items() if raw is not None else ():
                self._run(name, pipeline, raw, labels, reference)
        if first is None:
            raise DataError("The validation data is empty: give data with at least one image.")
        return first

    def stream_raw(self, batches: Iterator[Batch]) -> None:
        """Give a sample of the raw images to every pipeline, and the same ones to torch, to compare its score."""
        self.alike = self.task.tally()
        for images, labels, raw in batches:
            reference = self.reference(images) if self.reference is not None else None
            if reference is not None:
                self.alike.score(reference, labels)
            for name, pipeline in self.pipelines.items() if raw is not None else ():
                self._run(name, pipeline, raw, labels, reference)

    def _run(
        self,
        name: str,
        run: Callable[[Any], np.ndarray],
        images: Any,
        labels: np.ndarray | None,
        reference: np.ndarray | None,
    ) -> None:
        if name not in self.problems:
            with self._blame(name, "it does not run"):
                self._count(name, logits_of(run, images, reference), labels, reference)

    def _count(self, name: str, out: np.ndarray, labels: np.ndarray | None, reference: np.ndarray | None) -> None:
        tally = self.tallies[name]
        tally.score(out, labels)
        if reference is not None:
            # A pipeline promises the predictions of torch: only what its rounding may turn over passes for a tie.
            close = getattr(self.pipelines[name], "ties", ROUNDING) if name in self.pipelines else TOLERANCE
            tally.agreement(out, reference, close)
            tally.difference(out, reference)

    def probe(self, images: np.ndarray, golden: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Other batch sizes, and known inputs: their differences count, their images do not."""
        batches = [_repeat(images, size) for size in PROBED_BATCHES]
        known = [(batch, self.reference(batch) if self.reference is not None else None) for batch in batches]
        everyone = self.runners if self.reference is None else {"torch": self.reference, **self.runners}
        for name, run in everyone.items():
            # The known inputs are noise, for which less than float32 is not made.
            for batch, expected in [*known, golden] if golden and self._precision(name) == "fp32" else known:
                if name not in self.problems:
                    with self._blame(name, f"it does not run {len(batch)} images at once"):
                        out = logits_of(run, batch, expected)
                        if expected is not None:
                            self.tallies[name].difference(out, expected)

    def rows(self, labelled: bool, gates: Gates) -> list[Row]:
        """One judged row for torch, each exported file and each pipeline that was run."""
        rows: list[Row] = []
        expected, task = gates.expected, self.task
        gates = replace(gates, margin=chance(gates, self.labels))
        if self.student is not None:
            row = self._row("torch", None, _megabytes(self.student), labelled)
            row["precision"] = "fp32"
            # Wrong weights, labels or preprocessing show here, before they are blamed on a file. Three images more may
            # fall: when it was last measured, in training, it may have been in mixed precision.
            lenient = replace(gates, margin=gates.margin + 300 / self.count)
            rows.append(judge(row, expected, lenient, TOLERANCE, task=task, known="when last measured it was"))
            expected, gates = score(row, task.metric), replace(gates, margin=0.0)
        for name, exported in self.targets.items():
            row = self._row(name, exported.path.name, _size(exported.path), labelled)
            row["precision"], row["runtime"] = self._precision(name), exported.runtime
            tolerance = exported.tolerance or float(getattr(exported.module, "TOLERANCE", TOLERANCE))
            row = judge(row, expected, gates, tolerance, task=task, labelled=labelled)
            rows.append(follow(row, rows) if exported.runtime else row)
            made_for = getattr(exported.module, "MADE_FOR", None)
            if row["pass"] and made_for and made_for != torch.device(self.devices[name]).type:
                row["worth_shipping"], row["reason"] = None, f"made for {made_for}: what its speed is here says nothing"
        tried = [name for name in self.pipelines if self.tallies[name].images or name in self.problems]
        return rows + [self._pipeline_row(name, expected, gates, labelled) for name in tried]

    def _pipeline_row(self, name: str, expected: float | None, gates: Gates, labelled: bool) -> Row:
        """The judged row of a pipeline: against torch on the same images, where it was run on a sample of them."""
        pipeline, images = self.pipelines[name], self.tallies[name].images
        path, precision = getattr(pipeline, "path", None), getattr(pipeline, "precision", "fp32")
        row = self._row(name, path.name if path else name, _size(path) if path else None, labelled)
        if self.student is None:
            gates = replace(gates, margin=chance(gates, range(images)))
        elif labelled and self.alike.images:
            expected = self.alike.scores()[self.task.metric]
        drop, least, tolerance = gates.drop(precision), gates.agreement(precision), math.inf
        if precision == "fp32":
            drop, tolerance = 100 * row["ties"] / max(images, 1) if gates.max_drop is None else drop, PIPELINE_TOLERANCE
            least = 100.0 if gates.min_agreement is None else least
        row = judge(row, expected, replace(gates, max_drop=drop, min_agreement=least), tolerance, task=self.task)
        if row["pass"] and images < self.count:
            row["reason"] = f"run on {images:,} of the {self.count:,} images, spread over the classes"
        return row

    def _precision(self, name: str) -> str:
        if name not in self.targets:
            return "fp32"
        return self.targets[name].precision or str(getattr(self.targets[name].module, "PRECISION", "fp32"))

    def _row(self, name: str, file: str | None, megabytes: float | None, labelled: bool) -> Row:
        tally = self.tallies[name]
        row = _new_row(name, file, tally, labelled, self.task)
        row |= {"mb": megabytes, "provider": self.providers.get(name), "layers": self.layers.get(name) or None}
        reason = self.problems.get(name) or (None if tally.finite else "it gives logits that are not finite")
        if reason:
            fail(row, reason)
        return row

    def time(
        self,
        rows: list[Row],
        images: np.ndarray,
        batch_sizes: Sequence[int],
        threads: int,
        alone: tuple[str, Path] | None,
    ) -> None:
        """Fill in the latency of torch and of every file that runs: one process each, and nothing beside it."""
        self.runners.clear()  # no idle thread pool disturbs the clock
        images = _repeat(images, max(batch_sizes))
        for number, row in enumerate(rows, 1):
            name = row["name"]
            say(f"timing {number} of {len(rows)}: {name}")
            try:
                if name in self.targets and name not in self.problems and row["worth_shipping"] is not None:
                    exported = self.targets[name]
                    module, where, options = str(exported.module.__file__), self.devices[name], exported.options or None
                    row["latency"] = measure_alone(module, exported.path, where, images, batch_sizes, threads, options)
                elif name == "torch" and alone is not None:
                    row["latency"] = measure_alone(*alone, self.device, images, batch_sizes, threads)
                elif name == "torch" and self.reference is not None:  # nobody else can build the network
                    row["latency"] = self._time_torch(images, batch_sizes, threads)
            except RuntimeError as error:
                fail(row, f"it does not run in a process of its own: {without_paths(str(error))}")

    def _time_torch(self, images: np.ndarray, batch_sizes: Sequence[int], threads: int) -> list[Latency]:
        assert self.reference is not None
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            on_cpu = threads if torch.device(self.device).type == "cpu" else None
            return latency.measure(self.reference, images, batch_sizes, on_cpu)
        finally:
            torch.set_num_threads(before)


def _batches(data: Any | None, input_size: Sequence[int], raw: bool) -> Iterator[Batch]:
    """The validation batches, or random ones without labels where there are none."""
    if data is None or data.validation is None:
        generator = np.random.default_rng(0)
        for _ in range(0, RANDOM_IMAGES, 16):
            yield generator.standard_normal((16, *input_size), dtype=np.float32), None, None
        return
    originals = iter(data.validation_images) if raw and data.validation_images is not None else None
    for images, labels in data.validation:
        batch = np.ascontiguousarray(torch.as_tensor(images).detach().float().cpu().numpy())
        truth = torch.as_tensor(labels).cpu().numpy()
        pairs = list(itertools.islice(originals, len(batch))) if originals is not None else None
        if pairs is not None and [np.asarray(label).tolist() for _, label in pairs] != truth.tolist():
            raise DataError("validation_images does not give the images of validation in the same order.")
        yield batch, truth, [image for image, _ in pairs] if pairs is not None else None


def failed_row(name: str, reason: str, task: Task) -> Row:
    """The row of a file that is wrong without having been run."""
    row = _new_row(name, name, task.tally(), False, task)
    fail(row, reason)
    return row


def _new_row(name: str, file: str | None, tally: Tally, labelled: bool, task: Task) -> Row:
    """A row with what was counted, that has not failed yet."""
    return {
        "name": name, "file": file, "mb": None, "provider": None, "runtime": None, "precision": None, "layers": None,
        **cast(Figures, tally.row(labelled, task.scores)),
        "latency": [], "pass": True, "worth_shipping": True, "reason": None,
    }  # fmt: skip


def _repeat(images: np.ndarray, count: int) -> np.ndarray:
    """`count` images, over and over where there are fewer."""
    return np.ascontiguousarray(images[np.arange(count) % len(images)])


def _size(path: Path) -> float | None:
    """Megabytes of a file, or of all the files in a folder; None where nothing is."""
    files = [file for file in (path, *path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6 if files else None


def _megabytes(network: nn.Module) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()) / 1e6
