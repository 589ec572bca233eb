"""The one training loop, shared by every method: plain torch, exact to resume, and never a bad checkpoint."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from okdc.errors import DataError, RecipeError, counted
from okdc.ranks import barrier, first, rank, share, world
from okdc.recipe import TrainSettings
from okdc.system.randomness import own_randomness, seed_everything
from okdc.system.signals import StopSignal
from okdc.system.waiting import Waiting
from okdc.training import checkpoint
from okdc.training.evaluation import evaluate
from okdc.training.loggers import Loggers
from okdc.training.lost_data import data_that_stops
from okdc.training.machine import Machine, fast_arithmetic
from okdc.training.parallel import synchronised
from okdc.training.progress import Display, Row, faster_data, write_summary
from okdc.training.restoring import restore
from okdc.training.saving import Saver
from okdc.training.state import Run, TrainState, build, save
from okdc.training.step import Batch, put, stepper
from okdc.training.watch import Watch

if TYPE_CHECKING:
    from okdc.data import Data
    from okdc.methods import Method

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that replay them

log = logging.getLogger("okdc")


def fit(
    method: Method,
    data: Data,
    settings: TrainSettings,
    folder: Path,
    *,
    resume: Path | None = None,
    arch: str,
    recipe: dict[str, Any],
    begin: Callable[[], None] = lambda: None,
    loggers: Loggers | None = None,
    go_on: str | None = None,
) -> TrainState:
    """Train `method` on `data`, leaving last.pth.tar, model_best.pth.tar and summary.csv in `folder`.

    `begin` is called when nothing more can be refused, before anything is written to `folder`. `loggers` are told of
    each epoch. `go_on` is the command that continues the run, told when it is stopped.
    `resume` is the last.pth.tar of an interrupted run, which goes on as if nothing had happened; a complete one is
    returned at once. The method is left with the weights of the last epoch, the best are in model_best.pth.tar.
    RunError for a checkpoint of another run, TrainingError when the loss stays non-finite, RecipeError for settings
    that timm does not know, SystemExit with 129, 130 or 143 after SIGHUP, Ctrl-C or SIGTERM, step finished and saved.
    TrainingError also when no data comes for `settings.timeout` seconds, saved too, or when a data worker dies.
    """
    folder, settings = Path(folder), replace(settings, eval_metric=settings.eval_metric or method.task.metric)
    _refuse(method, data, settings)
    steps = math.ceil(len(data.train) / settings.grad_accum_steps)
    loggers = loggers or Loggers((), folder, recipe)
    run = Run(settings, folder, arch, recipe, Machine.of(settings), steps, go_on)
    outputs = method.cohort.anatomy.num_classes
    advice = faster_data(recipe, getattr(data.train, "resident", False))
    show = Display(settings.epochs, steps, settings.log_interval, advice, rank() > 0, method.task, outputs)
    in_float32 = fast_arithmetic(settings)
    with own_randomness(), in_float32, StopSignal() as stop, show as display, synchronised(method, settings.sync_bn):
        state = build(method, run)
        if resume is not None:
            changed = restore(state, checkpoint.load_run(resume), Path(resume), run)
        first(begin)
        folder.mkdir(parents=True, exist_ok=True)
        if resume is None:
            first(lambda: save(state, run))  # whatever happens from here on, there is something to continue from
        else:
            done = f"{counted(state.epoch, 'epoch')} and {counted(state.step, 'step')}"
            display.note(f"Continuing {resume}: {done} are done.{changed}")
            first(lambda: write_summary(folder / "summary.csv", state.history))
        loggers.begin(state.history)
        if not state.is_over(settings):
            waiting = Waiting(settings.timeout if world() == 1 else 0)  # of several ranks the watch says which is late
            # What was done is saved when no alarm of `waiting` can ring any more, and nothing else is being written.
            with data_that_stops(state, run), Saver(state, run) as saver, waiting, Watch(settings.timeout) as watch:
                _train(state, data, run, stop, display, loggers, waiting, watch, saver)
            _tell_idle(state)
        if early := state.stopped_early(settings):
            display.note(f"Stopped early {early}. A larger --patience with --resume goes on.")
        barrier()  # what the first rank has written is there for all
    method.eval()
    return state


def _refuse(method: Method, data: Data, settings: TrainSettings) -> None:
    """DataError or RecipeError for settings that cannot be with this method, this data or one another."""
    if not len(data.train):
        raise DataError(
            "there are no training batches; expected one at least. Give more images or a smaller --batch-size."
        )
    if settings.patience and data.validation is None:
        raise RecipeError("--patience waits for a better validation, and there are no validation images: give some.")
    if settings.torchcompile and settings.grad_accum_steps > 1 and settings.torchcompile_mode in CUDA_GRAPHS:
        raise RecipeError(
            f"--torchcompile-mode {settings.torchcompile_mode} replays CUDA graphs, which keep gradients in memory of "
            f"their own, so that none can be added up over --grad-accum-steps {settings.grad_accum_steps}: leave out "
            "one of the two, or take --torchcompile-mode max-autotune-no-cudagraphs."
        )
    if settings.sync_bn and method.second_order:
        raise RecipeError(f"{type(method).__name__} needs second derivatives, and --sync-bn has none: leave it out.")
    if method.second_order and any(getattr(module, "grad_checkpointing", False) for module in method.modules()):
        raise RecipeError(
            f"{type(method).__name__} tries out other weights within a step, and gradient checkpointing computes again "
            "with those of its end: leave out --grad-checkpointing, or network.set_grad_checkpointing(False)."
        )
    if settings.branch_lr_scale != 1 and len(method.cohort) == 1:
        raise RecipeError("--branch-lr-scale is of other members, and there are none: leave it out, or give --lr.")


def _train(
    state: TrainState,
    data: Data,
    run: Run,
    stop: StopSignal,
    display: Display,
    loggers: Loggers,
    waiting: Waiting,
    watch: Watch,
    saver: Saver,
) -> None:
    method, settings = state.method, run.settings
    step = stepper(state, run, stop)
    clock = None
    while not state.is_over(settings):
        method.begin_epoch(state.epoch, settings.epochs)
        _begin_epoch(state, data, run, waiting, watch)
        method.train()
        batches = data.train.batches(state.epoch, state.step * settings.grad_accum_steps)
        batches = waiting.over(watch.over(batches, "training", state))
        state.late = 0.0 if clock else None  # of the first epoch of this process alone
        now = time.perf_counter()
        state.between, clock = now - clock if clock else state.between, now
        waiting.taken()
        while state.step < run.steps and (group := list(islice(batches, settings.grad_accum_steps))):
            losses = step(group)
            state.step += 1
            if state.schedule is not None:
                state.schedule.step_update(state.epoch * run.steps + state.step)
            clock = _count(state, losses, group, clock, waiting)
            if not losses and state.sums["skipped"] == 1:  # the epoch's row counts the others
                bad = next(name for name in state.sums if name.startswith("skipped/")).removeprefix("skipped/")
                display.note(f"step {state.step} of epoch {state.epoch + 1} was skipped: {put(bad)} was not finite")
            display.step(state.epoch, state.step, losses, state.lr, state.speed, state.seconds_left(run))
            _leave_if_asked(state, run, stop, display, saver)
            saver.check()
            if settings.recovery_interval and state.step % settings.recovery_interval == 0 and rank() == 0:
                saver.save()
        if not state.sums:
            raise DataError(f"epoch {state.epoch + 1} had no batches; give a loader that can be read anew each epoch.")

        state.step = run.steps  # also where the data gave fewer batches than it promised
        metrics: dict[str, float] = {}
        counts = None
        if data.validation is not None:
            batches = waiting.over(watch.over(share(data.validation), "validation", state))
            metrics, counts = evaluate(state, batches, run.machine, stop)
            _leave_if_asked(state, run, stop, display, saver)
        state.between = time.perf_counter() - clock
        row = _row(state, metrics)
        _finish_epoch(state, row, counts, run, saver)
        display.epoch(row)
        loggers.epoch(row)
        _leave_if_asked(state, run, stop, display, saver)


@torch.no_grad()
def _begin_epoch(state: TrainState, data: Data, run: Run, waiting: Waiting, watch: Watch) -> None:
    """Show the method the images that were set aside for it, in eval mode; not again when an epoch is resumed."""
    if data.held_out is None or state.step:
        return
    state.method.eval()
    seed_everything(run.settings.seed, state.epoch)
    aside = waiting.over(watch.over(share(data.held_out), "images set aside", state))
    batches = (run.machine.move(*batch) for batch in aside)
    with run.machine.autocast():
        state.method.before_epoch((images, labels) for images, labels in batches)


def _count(state: TrainState, losses: dict[str, float], group: list[Batch], clock: float, waiting: Waiting) -> float:
    """Add one step to the sums of the epoch; the time at which the next step begins, seconds."""
    now = time.perf_counter()
    images = world() * sum(len(labels) for _, labels, *_ in group)
    counts: dict[str, float] = {"steps": bool(losses), "skipped": not losses, "images": images}
    waited = waiting.taken()
    state.late = now - clock if state.late is None else state.late
    counts |= {"seconds": now - clock, "waited": waited}
    for name, value in {**counts, **{f"loss/{name}": value for name, value in losses.items()}}.items():
        state.sums[name] = state.sums.get(name, 0) + value
    return now


def _logged(sums: dict[str, float]) -> list[tuple[str, float]]:
    """What the method has logged in the epoch's steps, and in how many of them."""
    return [(key.removeprefix("times/"), times) for key, times in sums.items() if key.startswith("times/")]


def _row(state: TrainState, metrics: dict[str, float]) -> Row:
    """The line of the history for the epoch that has just been trained; timm's columns come first."""
    sums = state.sums
    losses = {name: value / sums["steps"] for name, value in sums.items() if name.startswith("loss/")}
    task = state.method.task
    members = [f"{task.metric}/{name}" for name in (*state.method.learners, "ensemble")]
    return {
        "epoch": state.epoch,
        "train_loss": sum(losses.values()) if losses else math.nan,
        **{f"eval_{name}": metrics.get(f"eval_{name}") for name in ("loss", *task.metrics)},
        "lr": state.lr,
        **losses,
        **{f"log/{name}": sums[f"log/{name}"] / times for name, times in _logged(sums)},
        **{name: metrics.get(name) for name in members},
        "seconds": sums["seconds"] + state.between,
        "images_per_second": state.speed,
        "data_wait": 100 * sums["waited"] / sums["seconds"],  # per cent of the steps' time
        "skipped_steps": int(sums["skipped"]),
        **{name: value for name, value in sums.items() if name.startswith("skipped/")},
    }


def _finish_epoch(state: TrainState, row: Row, counts: Tensor | None, run: Run, saver: Saver) -> None:
    task, value = state.method.task, row[run.metric]
    metric = run.settings.eval_metric or task.metric
    # Without validation the last is the best.
    improved = value is None or state.best is None or task.better(metric, value, state.best)
    if improved:
        state.best, state.best_epoch, state.confusion = value, state.epoch, counts
    state.history.append(row)
    state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
    if state.schedule is not None:
        state.schedule.step(state.epoch)
    if rank() == 0:
        saver.save(best=improved)
        write_summary(run.folder / "summary.csv", state.history)


def _tell_idle(state: TrainState) -> None:
    """Warn of losses that were 0 in every step: they taught nothing."""
    kinds = dict.fromkeys(key for row in state.history for key in row if key.startswith("loss/"))
    for key in kinds:
        if rank() == 0 and all(row.get(key, 0) == 0 for row in state.history):
            log.warning(
                "the loss %s of %s was 0 in every step of the run, so it taught nothing: look at its weight and ramp",
                key.removeprefix("loss/"), type(state.method).__name__,
            )  # fmt: skip


def _leave_if_asked(state: TrainState, run: Run, stop: StopSignal, display: Display, saver: Saver) -> None:
    if not stop.wish:
        return
    first(lambda: saver.save(wait=True))
    by_path = f"okdc compress --resume {quote(str(run.last))}"
    where = f"{counted(state.epoch, 'epoch')} and {state.step} of {run.steps} steps are done and saved"
    display.note(f"Stopped: {where}. Continue with: {run.go_on or by_path}", always=True)
    raise SystemExit(stop.exit_code)
