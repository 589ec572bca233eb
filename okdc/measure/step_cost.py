"""What a training step costs beside the plain target's: both measured in one run, in turn, again and again."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from okdc import methods
from okdc.cohort import Cohort
from okdc.data import Data
from okdc.measure import estimate
from okdc.measure.memory import rise
from okdc.methods import Method
from okdc.pipeline import assemble, assemble_cohort
from okdc.recipe import Recipe, TrainSettings
from okdc.system.randomness import own_randomness
from okdc.system.signals import StopSignal
from okdc.training import TrainState
from okdc.training.machine import Machine, fast_arithmetic
from okdc.training.state import Run, build
from okdc.training.step import stepper

BURST = 0.05  # seconds: steps that are shorter are measured several at a time
WARM_UP = 2  # steps before anything is measured
DATA_SECONDS, DATA_BATCHES = 5.0, 50  # for so long at most, and for so many batches, the input pipeline is watched

Batch = tuple[Tensor, ...]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One way of computing, of the plain target and of the cohort; times in ms a step, memory in bytes."""

    name: str
    plain: Spread
    cohort: Spread
    plain_wall: Spread
    cohort_wall: Spread
    ratio: Spread  # of cohort over plain, round by round
    overhead: float  # that ratio over the ratio of FLOPs
    speedup: float  # of the cohort's step over the first row's
    plain_memory: int
    cohort_memory: int


@dataclass(frozen=True)
class DataSpeed:
    """The training images of `--data`: how many a second without training, and how training waits for them."""

    name: str
    images_per_second: float
    waiting: float  # share of the time, training with the settings of the recipe


@dataclass(frozen=True)
class Profile:
    """Times are CPU time on a CPU, which others may be using; wall time is beside.

    On a GPU they are those between two of its events, gaps between launches included: a small network waits there for
    the CPU that launches its work, and then both clocks tell the same.
    """

    model: str
    method: str
    input_size: tuple[int, ...]
    batch_size: int
    device: str
    threads: int
    rounds: int
    plain_flops: int  # of a step, forward and backward
    cohort_flops: int
    rows: tuple[Row, ...]
    data: DataSpeed | None

    @property
    def flops_ratio(self) -> float:
        return self.cohort_flops / self.plain_flops

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"flops_ratio": self.flops_ratio}


def profile(recipe: Recipe, *, rounds: int = 7, with_data: bool = False) -> Profile:
    """Measure steps on noise, `rounds` times each in turn, and with `with_data` how fast the recipe's images come.

    The plain target is trained by a loop of its own: forward, cross entropy, backward and the same optimizer.
    OkdcError where the method cannot serve the network or the data cannot be read.
    """
    with own_randomness(), fast_arithmetic(recipe.train):
        data = assemble.network_and_data(None, None, None, recipe)[1] if with_data else None
        if data:
            recipe = replace(recipe, network=replace(recipe.network, num_classes=len(data.classes)))
        method, _ = estimate.built(recipe)
        batch = methods.batch_of(method, assemble_cohort.needs(recipe)[0], recipe.train.batch_size)
        subjects = {layout: _Subjects(method, recipe, layout) for layout in (False, True)}
        flops = subjects[False].flops(batch)
        rows = _rows(subjects, recipe.train, batch, rounds, flops[1] / flops[0])
        own = Machine.of(recipe.train)
        return Profile(
            recipe.network.model, recipe.method["name"], method.cohort.anatomy.input_size, recipe.train.batch_size,
            torch.cuda.get_device_name(own.device) if own.device.type == "cuda" else "CPU", torch.get_num_threads(),
            rounds, *flops, rows,
            _data_speed(data, subjects[own.memory_format == torch.channels_last].cohort, recipe) if data else None,
        )  # fmt: skip


def _run(settings: TrainSettings) -> Run:
    return Run(settings, Path(), "profile", {}, Machine.of(settings), 1)


class _Subjects:
    """The plain target and the cohort in one memory layout, each with an optimizer of its own."""

    def __init__(self, method: Method, recipe: Recipe, channels_last: bool) -> None:
        self.settings = replace(recipe.train, channels_last=channels_last)
        run = _run(self.settings)
        target, anatomy = method.cohort.extract(0), method.cohort.anatomy
        plain = Cohort(target, torch.randn(2, *anatomy.input_size), anatomy=anatomy, task=method.task)
        self.plain = build(methods.get("baseline")(plain), run)
        self.cohort = build(copy.deepcopy(method), run)

    def plain_step(self, settings: TrainSettings, batch: Batch) -> Step:
        """A training step as one would write it by hand."""
        machine, optimizer = Machine.of(settings), self.plain.optimizer
        network, task = self.plain.method.cohort.target.train(), self.plain.method.task
        images, labels, *_ = machine.move(batch[0][0] if batch[0].dim() == 5 else batch[0], *batch[1:])
        if settings.torchcompile:
            network = torch.compile(network, mode=settings.torchcompile_mode)  # type: ignore[assignment]

        def step() -> None:
            with machine.autocast():
                logits = task.result(network(images))
            task.supervised(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def cohort_step(self, settings: TrainSettings, batch: Batch) -> Step:
        """A training step as `training.fit` takes it."""
        run = _run(settings)
        step, batch = stepper(self.cohort, run, StopSignal()), run.machine.move(*batch)
        self.cohort.method.train()
        return lambda: step([batch])

    def flops(self, batch: Batch) -> tuple[int, int]:
        """Of a plain step and of the cohort's, forward and backward."""
        settings, counts = replace(self.settings, amp=False, torchcompile=False), []
        for step in (self.plain_step(settings, batch), self.cohort_step(settings, batch)):
            with FlopCounterMode(display=False) as counter:
                step()
            counts.append(counter.get_total_flops())
        return counts[0], counts[1]


def _ways(settings: TrainSettings) -> dict[str, TrainSettings]:
    """The ways of computing that are compared, by name; compiled ones, which take minutes, where they are asked for."""
    bf16 = {"amp": True, "amp_dtype": "bfloat16"}
    ways: dict[str, dict[str, Any]] = {
        "fp32": {},
        "fp32 channels-last": {"channels_last": True},
        "bf16": bf16,
        "bf16 channels-last": {**bf16, "channels_last": True},
    }
    if settings.torchcompile:
        ways |= {f"{name} compiled": {**ways[name], "torchcompile": True} for name in ("fp32", "bf16 channels-last")}
    usual = replace(settings, amp=False, channels_last=False, torchcompile=False)
    return {name: replace(usual, **changes) for name, changes in ways.items()}


def _rows(
    subjects: dict[bool, _Subjects], settings: TrainSettings, batch: Batch, rounds: int, flops_ratio: float
) -> tuple[Row, ...]:
    steps: dict[str, tuple[Step, Step]] = {}
    memory: dict[str, list[int]] = {}
    device = Machine.of(settings).device
    for name, way in _ways(settings).items():
        subject = subjects[bool(way.channels_last)]
        steps[name] = subject.plain_step(way, batch), subject.cohort_step(way, batch)
        for step in steps[name] * WARM_UP:
            step()
        pairs = zip((subject.plain, subject.cohort), steps[name], strict=True)
        memory[name] = [_held(state) + rise(step, device) for state, step in pairs]
    counts = {name: [_burst(step, device) for step in pair] for name, pair in steps.items()}
    times: dict[str, list[list[tuple[float, float]]]] = {name: [[], []] for name in steps}
    with _no_collecting():
        for _ in range(rounds):
            for name, pair in steps.items():
                for i, step in enumerate(pair):
                    times[name][i].append(_time(step, counts[name][i], device))
    first = statistics.median(own for own, _ in next(iter(times.values()))[1])
    return tuple(_row(name, times[name], memory[name], flops_ratio, first) for name in steps)


def _row(name: str, times: list[list[tuple[float, float]]], memory: list[int], flops_ratio: float, first: float) -> Row:
    plain, cohort = times
    ratio = Spread.of([theirs[0] / ours[0] for ours, theirs in zip(plain, cohort, strict=True)])
    own, wall = ([Spread.of([each[clock] for each in times]) for times in (plain, cohort)] for clock in (0, 1))
    return Row(
        name, own[0], own[1], wall[0], wall[1], ratio, ratio.median / flops_ratio, first / own[1].median,
        memory[0], memory[1],
    )  # fmt: skip


def _time(step: Step, count: int, device: torch.device) -> tuple[float, float]:
    """ms a step: of CPU time, or between two events of the GPU; and those of the clock on the wall."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            begin.record()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    own = time.process_time() - cpu
    if device.type == "cuda":
        with torch.cuda.device(device):
            end.record()
        torch.cuda.synchronize(device)
        own = begin.elapsed_time(end) / 1e3
    return 1e3 * own / count, 1e3 * (time.perf_counter() - wall) / count


def _burst(step: Step, device: torch.device) -> int:
    """How many steps are measured together, so that they take at least as long as a clock can tell."""
    return max(1, round(1e3 * BURST / max(_time(step, 1, device)[1], 1e-3)))


def _held(state: TrainState) -> int:
    """Bytes that are kept from step to step: weights, buffers and what the optimizer remembers of them."""
    remembered = [value for each in state.optimizer.state.values() for value in each.values()]
    tensors = [*state.method.parameters(), *state.method.buffers(), *remembered]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


@contextmanager
def _no_collecting() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _data_speed(data: Data, state: TrainState, recipe: Recipe) -> DataSpeed:
    """Read batches without training, then train on them as `fit` does; the first of each is not counted."""
    run = _run(recipe.train)
    step = stepper(state, run, StopSignal())
    state.method.train()
    rates = []
    for train in (None, step):
        batches = islice(data.train.batches(0), DATA_BATCHES)
        next(batches)
        images, waited, begin = 0, 0.0, time.perf_counter()
        while time.perf_counter() - begin < DATA_SECONDS:
            start = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - start
            if batch is None:
                break
            images += len(batch[1])
            if train:
                train([batch])
        rates.append((images / waited, waited / (time.perf_counter() - begin)))
    return DataSpeed(data.name, rates[0][0], rates[1][1])
