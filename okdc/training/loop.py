"""The one training loop, shared by every method: plain torch, exact to resume, and never a bad checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from okdc.errors import DataError, RecipeError, TrainingError
from okdc.ranks import barrier, first, rank, share, world
from okdc.recipe import TrainSettings
from okdc.system.randomness import own_randomness, seed_everything
from okdc.system.signals import StopSignal
from okdc.system.waiting import Waiting
from okdc.training import checkpoint
from okdc.training.lost_data import data_that_stops
from okdc.training.machine import Machine
from okdc.training.parallel import synchronised, wrapped
from okdc.training.progress import Display, Events, Row, faster_data, write_summary
from okdc.training.state import Run, TrainState, build, restore, save
from okdc.training.watch import Watch

if TYPE_CHECKING:
    from okdc.data import Data
    from okdc.methods import Method

# Skipped steps in a row after which a run stops; fp16 may need a good many of them to find its scale.
PATIENCE, PATIENCE_FP16 = 5, 25
LARGEST_STATISTIC = 2**14  # numbers in a buffer of batch norm and the like

Batch = tuple[Tensor, ...]  # images, labels, and the images' indices where the method needs them


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
) -> TrainState:
    """Train `method` on `data`, leaving last.pth.tar, model_best.pth.tar, summary.csv and events in `folder`.

    `begin` is called when nothing more can be refused, before anything is written to `folder`.
    `resume` is the last.pth.tar of an interrupted run, which goes on as if nothing had happened; a complete one is
    returned at once. The method is left with the weights of the last epoch, the best are in model_best.pth.tar.
    RunError for a checkpoint of another run, TrainingError when the loss stays non-finite, RecipeError for settings
    that timm does not know, SystemExit with 129, 130 or 143 after SIGHUP, Ctrl-C or SIGTERM, step finished and saved.
    TrainingError also when no data comes for `settings.timeout` seconds, saved too, or when a data worker dies.
    """
    folder = Path(folder)
    if not len(data.train):
        raise DataError(
            "there are no training batches; expected one at least. Give more images or a smaller --batch-size."
        )
    if settings.sync_bn and method.second_order:
        raise RecipeError(f"{type(method).__name__} needs second derivatives, and --sync-bn has none: leave it out.")
    steps = math.ceil(len(data.train) / settings.grad_accum_steps)
    run = Run(settings, folder, arch, recipe, Machine.of(settings), steps)
    advice = faster_data(recipe, getattr(data.train, "resident", False))
    show = Display(settings.epochs, steps, settings.log_interval, advice, quiet=rank() > 0)
    with own_randomness(), StopSignal() as stop, show as display, synchronised(method, settings.sync_bn):
        state = build(method, run)
        if resume is not None:
            changed = restore(state, checkpoint.load_run(resume), Path(resume), run)
        first(begin)
        folder.mkdir(parents=True, exist_ok=True)
        if resume is None:
            first(lambda: save(state, run))  # whatever happens from here on, there is something to continue from
        else:
            display.note(f"Continuing {resume}: {state.epoch} epochs and {state.step} steps are done.{changed}")
            first(lambda: write_summary(folder / "summary.csv", state.history))
        if state.epoch < settings.epochs:
            events = Events(folder, state.epoch, quiet=rank() > 0)
            waiting = Waiting(settings.timeout if world() == 1 else 0)  # of several ranks the watch says which is late
            # What was done is saved when no alarm of `waiting` can ring any more.
            with contextlib.closing(events), data_that_stops(state, run), waiting, Watch(settings.timeout) as watch:
                _train(state, data, run, stop, display, events, waiting, watch)
        barrier()  # what the first rank has written is there for all
    method.eval()
    return state


def _train(
    state: TrainState,
    data: Data,
    run: Run,
    stop: StopSignal,
    display: Display,
    events: Events,
    waiting: Waiting,
    watch: Watch,
) -> None:
    method, settings = state.method, run.settings
    step = stepper(state, run, stop)
    clock = None
    while state.epoch < settings.epochs:
        method.epoch.fill_(state.epoch)
        _begin_epoch(state, data, run, waiting, watch)
        method.train()
        batches = data.train.batches(state.epoch, state.step * settings.grad_accum_steps)
        batches = waiting.over(watch.over(batches, "training", state))
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
                display.note(f"step {state.step} of epoch {state.epoch + 1} was skipped: {_put(bad)} was not finite")
            display.step(state.epoch, state.step, losses, state.lr, state.speed, state.seconds_left(run))
            _leave_if_asked(state, run, stop, display)
            if settings.recovery_interval and state.step % settings.recovery_interval == 0 and rank() == 0:
                save(state, run)
        if not state.sums:
            raise DataError(f"epoch {state.epoch + 1} had no batches; give a loader that can be read anew each epoch.")

        state.step = run.steps  # also where the data gave fewer batches than it promised
        metrics = None
        if data.validation is not None:
            batches = waiting.over(watch.over(share(data.validation), "validation", state))
            metrics = _evaluate(state, batches, run.machine, stop)
            _leave_if_asked(state, run, stop, display)
        state.between = time.perf_counter() - clock
        row = _row(state, metrics)
        _finish_epoch(state, row, run)
        display.epoch(row)
        events.epoch(row)
        _leave_if_asked(state, run, stop, display)


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


def stepper(state: TrainState, run: Run, stop: StopSignal) -> Callable[[list[Batch]], dict[str, float]]:
    """One optimizer step over a group of batches, as a function; it gives the mean of every loss part."""
    compiles, mode = run.settings.torchcompile, run.settings.torchcompile_mode
    learner = wrapped(torch.compile(state.method, mode=mode) if compiles else state.method, run.machine.device)
    buffers = _Buffers(state.method)
    return lambda group: _step(state, learner, group, buffers, run, stop)


def _step(
    state: TrainState, learner: Any, group: list[Batch], buffers: _Buffers, run: Run, stop: StopSignal
) -> dict[str, float]:
    """One optimizer step over a group of batches: the mean of every loss part, or {} where the step was skipped."""
    optimizer, scaler, machine = state.optimizer, state.scaler, run.machine
    buffers.keep()
    total = sum(len(labels) for _, labels, *_ in group)
    names: list[str] = []
    parts: Any = 0
    state.method.lr.fill_(state.lr)
    for i, given in enumerate(group):
        batch = machine.move(*given)
        seed_everything(run.settings.seed, state.epoch, state.step, i, rank=rank())
        with machine.autocast():
            losses = learner(*batch)
        names, terms, portion = list(losses), list(losses.values()), len(batch[1]) / total
        # From each term, not from a stack of them, which would be one operation more, forward and backward.
        roots = [scaler.scale(term) for term in terms if term.requires_grad]
        torch.autograd.backward(roots, [torch.full_like(root, portion) for root in roots])
        parts = parts + torch.stack([term.detach().float() for term in terms]) * portion

    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        raise TrainingError("no parameter that is trained reaches the loss. Unfreeze one that the logits depend on.")
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
    told = torch.cat([parts, norms.float()])
    # The one time that a step waits for the device.
    values = stop.agree(told, buffers.statistics) if world() > 1 else told.tolist()
    bad = [name for name, value in zip(names + ["gradient"] * len(norms), values) if not math.isfinite(value)]
    if bad:
        buffers.put_back()
    else:
        if run.settings.clip_grad is not None:
            clip_grads_with_norm_(parameters, run.settings.clip_grad, torch.linalg.vector_norm(norms))
        scaler.step(optimizer)
    scaler.update()
    for parameter in parameters:  # what optimizer.zero_grad() does, and it takes 25 us to begin
        parameter.grad = None
    if bad:
        _skip(state, bad[0], run)
        return {}
    state.skipped_in_a_row = 0
    with machine.autocast():
        state.method.after_step(machine.move(*given) for given in group)
    if state.ema:
        state.ema.update(state.method.cohort.target, step=state.epoch * run.steps + state.step + 1)
    return dict(zip(names, values))


class _Buffers:
    """The method's buffers: batch norm has seen a batch before its loss is known, so a skipped step puts them back.

    But for large ones of two kinds: a method's memory of all training images, which refuses what is not finite, and
    what no checkpoint holds, because it never changes.
    """

    def __init__(self, method: nn.Module) -> None:
        self.groups: dict[
            torch.dtype, tuple[list[Tensor], list[Tensor]]
        ] = {}  # of one type, so that a copy is one call
        names = ("running_mean", "running_var")  # of whatever norm; every rank has seen a part of the batch
        self.statistics = [buffer for name, buffer in method.named_buffers() if name.endswith(names)]
        saved = {name for name in method.state_dict() if name.startswith("cohort.")}
        for name, buffer in method.named_buffers():
            if name in saved or buffer.numel() <= LARGEST_STATISTIC:
                live, kept = self.groups.setdefault(buffer.dtype, ([], []))
                live.append(buffer)
                kept.append(buffer.clone())

    def keep(self) -> None:
        for live, kept in self.groups.values():
            torch._foreach_copy_(kept, live)

    def put_back(self) -> None:
        for live, kept in self.groups.values():
            torch._foreach_copy_(live, kept)


def _skip(state: TrainState, name: str, run: Run) -> None:
    """Count a step that was not taken because `name` was not finite; TrainingError when it happens again and again."""
    state.skipped_in_a_row += 1
    state.sums[f"skipped/{name}"] = state.sums.get(f"skipped/{name}", 0) + 1
    scaling = name == "gradient" and state.scaler.is_enabled()
    if state.skipped_in_a_row < (PATIENCE_FP16 if scaling else PATIENCE):
        return
    raise TrainingError(
        f"{_put(name)} was not finite for {state.skipped_in_a_row} steps in a row, up to step {state.step + 1} of "
        f"epoch {state.epoch + 1}. The last good state is kept: continue {run.last} with a lower --lr, --clip-grad 1, "
        "or --amp-dtype bfloat16 where it was float16."
    )


def _put(name: str) -> str:
    return "the gradient" if name == "gradient" else f"the loss term {name!r}"


def _count(state: TrainState, losses: dict[str, float], group: list[Batch], clock: float, waiting: Waiting) -> float:
    """Add one step to the sums of the epoch; the time at which the next step begins, seconds."""
    now = time.perf_counter()
    images = world() * sum(len(labels) for _, labels, *_ in group)
    counts: dict[str, float] = {"steps": bool(losses), "skipped": not losses, "images": images}
    counts |= {"seconds": now - clock, "waited": waiting.taken()}
    for name, value in {**counts, **{f"loss/{name}": value for name, value in losses.items()}}.items():
        state.sums[name] = state.sums.get(name, 0) + value
    return now


@torch.no_grad()
def _evaluate(state: TrainState, validation: Any, machine: Machine, stop: StopSignal) -> dict[str, float]:
    """Top-1 of every member, of the ensemble and of the student, per cent, in eval mode; partial after a signal."""
    # Not inference_mode: a network that caches tensors, say position embeddings, could then not train on.
    state.method.eval()
    names = [*(f"top1/{name}" for name in state.method.cohort.names), "top1/ensemble", "eval_top1"]
    total, sums = 0, torch.zeros(len(names) + 2, dtype=torch.float64)
    for images, labels in takewhile(lambda _: not stop.signal, validation):
        images, labels = machine.move(images, labels)
        with machine.autocast():
            out = state.method.cohort(images)
            ensemble = state.method.ensemble(out)
            student = out.logits[0] if state.student is state.method.cohort.target else state.student(images)
        counts = [(logits.argmax(1) == labels).sum() for logits in (*out.logits, ensemble, student)]
        top5 = student.topk(min(5, student.shape[1])).indices.eq(labels[:, None]).sum()
        loss = F.cross_entropy(student.float(), labels, reduction="sum")
        sums += torch.stack([*counts, top5, loss]).cpu()
        total += len(images)
    if world() > 1:
        sums, total = _of_all_ranks(sums, total, machine, stop)
    if not total and state.best is not None and not stop.wish:  # it did give some before
        raise DataError("the validation data gave no images this time; give a loader that can be read anew each epoch.")
    if not total:
        return {}
    means = dict(zip([*names, "eval_top5", "eval_loss"], (sums / total).tolist()))
    return {name: value if name == "eval_loss" else 100 * value for name, value in means.items()}


def _of_all_ranks(sums: Tensor, total: int, machine: Machine, stop: StopSignal) -> tuple[Tensor, int]:
    means = stop.agree(torch.cat([sums, sums.new_tensor([total])]).to(machine.device))
    return world() * sums.new_tensor(means[:-1]), round(world() * means[-1])


def _row(state: TrainState, metrics: dict[str, float] | None) -> Row:
    """The line of the history for the epoch that has just been trained; timm's columns come first."""
    sums, metrics = state.sums, metrics or {}
    losses = {name: value / sums["steps"] for name, value in sums.items() if name.startswith("loss/")}
    members = [f"top1/{name}" for name in (*state.method.cohort.names, "ensemble")]
    return {
        "epoch": state.epoch,
        "train_loss": sum(losses.values()) if losses else math.nan,
        **{name: metrics.get(name) for name in ("eval_loss", "eval_top1", "eval_top5")},
        "lr": state.lr,
        **losses,
        **{name: metrics.get(name) for name in members},
        "seconds": sums["seconds"] + state.between,
        "images_per_second": state.speed,
        "data_wait": 100 * sums["waited"] / sums["seconds"],  # per cent of the steps' time
        "skipped_steps": int(sums["skipped"]),
        **{name: value for name, value in sums.items() if name.startswith("skipped/")},
    }


def _finish_epoch(state: TrainState, row: Row, run: Run) -> None:
    top1 = row["eval_top1"]
    improved = top1 is None or state.best is None or top1 > state.best  # without validation the last is the best
    if improved:
        state.best, state.best_epoch = top1, state.epoch
    state.history.append(row)
    state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
    if state.schedule is not None:
        state.schedule.step(state.epoch)
    if rank() == 0:
        save(state, run, best=improved)
        write_summary(run.folder / "summary.csv", state.history)


def _leave_if_asked(state: TrainState, run: Run, stop: StopSignal, display: Display) -> None:
    if not stop.wish:
        return
    first(lambda: save(state, run))
    where = f"{state.epoch} epochs and {state.step} of {run.steps} steps are done and saved"
    display.note(f"Stopped: {where}. Continue with: okdc compress --resume {run.last}")
    raise SystemExit(stop.exit_code)
