"""One optimizer step, the same for every method: forward, backward, checks, update; skipped where it is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from okdc.errors import TrainingError
from okdc.ranks import rank, world
from okdc.system.randomness import seed_everything
from okdc.system.signals import StopSignal
from okdc.training.parallel import wrapped
from okdc.training.state import Run, TrainState

# Skipped steps in a row after which a run stops; fp16 may need a good many of them to find its scale.
PATIENCE, PATIENCE_FP16 = 5, 25
LARGEST_STATISTIC = 2**14  # numbers in a buffer of batch norm and the like

Batch = tuple[Tensor, ...]  # images, labels, and what else the method needs (`okdc.needs`)


def stepper(state: TrainState, run: Run, stop: StopSignal) -> Callable[[list[Batch]], dict[str, float]]:
    """One optimizer step over a group of batches, as a function; it gives the mean of every loss part."""
    compiles, mode = run.settings.torchcompile, run.settings.torchcompile_mode
    forward = wrapped(torch.compile(state.method, mode=mode) if compiles else state.method, run.machine.device)
    buffers = _Buffers(state.method)
    return lambda group: _step(state, forward, group, buffers, run, stop)


def _step(
    state: TrainState, forward: Any, group: list[Batch], buffers: _Buffers, run: Run, stop: StopSignal
) -> dict[str, float]:
    """One optimizer step over a group of batches: the mean of every loss part, or {} where the step was skipped."""
    optimizer, scaler, machine = state.optimizer, state.scaler, run.machine
    buffers.keep()
    total = sum(len(labels) for _, labels, *_ in group)
    parts: dict[tuple[str, ...], Tensor] = {}  # by names, which may be others in another batch of the group
    state.method.lr.fill_(state.lr)
    for i, given in enumerate(group):
        batch = machine.move(*given)
        seed_everything(run.settings.seed, state.epoch, state.step, i, rank=rank())
        with machine.autocast(), _one_image(len(batch[1]), run):
            losses = forward(*batch)
        names, terms, portion = tuple(losses), list(losses.values()), len(batch[1]) / total
        # From each term, not from a stack of them, which would be one operation more, forward and backward.
        roots = [scaler.scale(term) for term in terms if term.requires_grad]
        torch.autograd.backward(roots, [torch.full_like(root, portion) for root in roots])
        parts[names] = parts.get(names, 0) + torch.stack([term.detach().float() for term in terms]) * portion

    state.method.before_step()
    logged = state.method.logged()
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        raise TrainingError("no parameter that is trained reaches the loss. Unfreeze one that the logits depend on.")
    norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))
    told = torch.cat([*parts.values(), *_scalars(logged.values(), norms), norms.float()])
    # The one time that a step waits for the device.
    values = stop.agree(told, buffers.statistics) if world() > 1 else told.tolist()
    named = list(zip(chain(*parts), values))
    bad = [name for name, value in named if not math.isfinite(value)]
    bad += ["gradient"] * (not all(map(math.isfinite, values[-len(norms) :])))
    if bad:
        buffers.put_back()
    else:
        if limit := state.method.clipped_to(run.settings.clip_grad):
            clip_grads_with_norm_(parameters, limit, torch.linalg.vector_norm(norms))
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
    _note(state, zip(logged, values[len(named) :]))
    return _summed(named)


def _scalars(values: Iterable[Tensor | float], like: Tensor) -> Iterator[Tensor]:
    """Each as a tensor (1,) on a device, where a number need not wait to be copied."""
    for value in values:
        yield value.float().reshape(1) if isinstance(value, Tensor) else like.new_full((1,), value, dtype=torch.float32)


def _note(state: TrainState, logged: Iterable[tuple[str, float]]) -> None:
    """Add what a method logged to the sums of the epoch."""
    for name, value in logged:
        for key, more in ((f"log/{name}", value), (f"times/{name}", 1)):
            state.sums[key] = state.sums.get(key, 0) + more


def _summed(named: list[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, value in named:
        sums[name] = sums.get(name, 0.0) + value
    return sums


@contextmanager
def _one_image(images: int, run: Run) -> Iterator[None]:
    """TrainingError in place of what batch norm says of a batch of one image, where that has one pixel left."""
    try:
        yield
    except ValueError as error:
        if images > 1 or "more than 1 value per channel" not in str(error):
            raise
        raise TrainingError(
            "batch norm cannot learn from one image: where it stands, that has one pixel left, a channel one value. "
            f"Give it two images or more: -b 2, or larger batches of your own loader; --resume {run.last} goes on."
        ) from error


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
        f"{put(name)} was not finite for {state.skipped_in_a_row} steps in a row, up to step {state.step + 1} of "
        f"epoch {state.epoch + 1}. The last good state is kept: continue {run.last} with a lower --lr, --clip-grad 1, "
        "or --amp-dtype bfloat16 where it was float16."
    )


def put(name: str) -> str:
    """What was not finite, in words: a loss term, or the gradient."""
    return "the gradient" if name == "gradient" else f"the loss term {name!r}"
