"""What a training run is: built from its settings, and written to a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from okdc import tasks
from okdc.errors import RecipeError
from okdc.ranks import world
from okdc.recipe import TrainSettings
from okdc.training import checkpoint
from okdc.training.machine import Machine
from okdc.training.optimizer import make_optimizer, make_schedule
from okdc.training.progress import Row
from okdc.training.rates import plain

if TYPE_CHECKING:
    from okdc.methods import Method


# What a checkpoint holds of a state beside those of the parts that have a state_dict.
REMEMBERED = (
    "epoch", "step", "sums", "skipped_in_a_row", "best", "best_epoch", "confusion", "history", "between",
)  # fmt: skip

# The version of what is drawn, of the first where a checkpoint says none: pairs and images to compare with changed in
# the second, what is random in streams in the third.
DRAWS = 3


@dataclass
class TrainState:
    """Everything a run must remember: what is not here does not survive.

    Learning rates and random numbers are not here because they are functions of the settings, `epoch` and `step`.
    """

    method: Method
    optimizer: torch.optim.Optimizer
    schedule: Any  # timm's; None for `sched: none`
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    epoch: int = 0  # the epoch that is being trained, 0-based; when it is settings.epochs, the run is complete
    step: int = 0  # optimizer steps done in that epoch
    sums: dict[str, float] = field(default_factory=dict)  # over those steps
    skipped_in_a_row: int = 0
    best: float | None = None  # the student's best validation metric (`Run.metric`), per cent
    best_epoch: int | None = None
    confusion: Tensor | None = None  # what the task remembers of that epoch for the report: `Scorer.counts`
    history: list[Row] = field(default_factory=list)  # one row for each epoch done
    late: float | None = None  # seconds of this process's very first step; not saved
    between: float = 0.0  # seconds that it took to go on to the next epoch: to validate, to save

    @property
    def student(self) -> nn.Module:
        """What is evaluated and what ships: the method's student, or its moving average where there is one."""
        return self.ema.module if self.ema else self.method.student

    @property
    def lr(self) -> float:
        """The learning rate of the first parameter group, before that is scaled for its layer."""
        return plain(self.optimizer.param_groups[0])

    @property
    def speed(self) -> float:
        """Training images per second in this epoch so far."""
        return self.sums["images"] / self.sums["seconds"]

    def stopped_early(self, settings: TrainSettings) -> str:
        """When the run ended for want of patience and why, in words; nothing where it goes on, or went all the way."""
        if not settings.patience or self.best_epoch is None or self.epoch >= settings.epochs:
            return ""
        if self.epoch - 1 - self.best_epoch < settings.patience:
            return ""
        return (
            f"after epoch {self.epoch} of {settings.epochs}: no better {settings.eval_metric} than epoch "
            f"{self.best_epoch + 1}'s for {settings.patience} epoch{'s' * (settings.patience > 1)}"
        )

    def is_over(self, settings: TrainSettings) -> bool:
        """Whether nothing is left to train."""
        return self.epoch >= settings.epochs or bool(self.stopped_early(settings))

    def seconds_left(self, run: Run) -> float:
        """Until the run is complete, at the pace of this epoch's steps and with as long between epochs as last time.

        But for the first step of this process: workers start, the order of an epoch is made and kernels are chosen or
        compiled once. Until there is another one, its time without the wait for data is all that is known.
        """
        steps = self.sums["steps"] + self.sums["skipped"]
        if self.late and steps > 1:
            pace = (self.sums["seconds"] - self.late) / (steps - 1)
        else:
            pace = (self.sums["seconds"] - (self.sums["waited"] if self.late else 0.0)) / steps
        epochs = run.settings.epochs - self.epoch
        return pace * (epochs * run.steps - self.step) + self.between * epochs


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step of a run to the last."""

    settings: TrainSettings
    folder: Path
    arch: str
    recipe: dict[str, Any]
    machine: Machine
    steps: int  # optimizer steps per epoch
    go_on: str | None = None  # the command that continues it, where that is known

    @property
    def metric(self) -> str:
        """The column of the history that picks the best epoch."""
        return f"eval_{self.settings.eval_metric}"

    @property
    def last(self) -> Path:
        return self.folder / checkpoint.LAST


def build(method: Method, run: Run) -> TrainState:
    """The state of a run before its first step; RecipeError for what timm does not know."""
    settings, machine = run.settings, run.machine
    method.to(machine.device).to(memory_format=machine.memory_format)
    method.epochs.fill_(settings.epochs)
    optimizer = make_optimizer(method, settings)
    schedule = make_schedule(optimizer, settings, run.steps)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    # The decay warms up, else the average of a short run would be its initial weights.
    if settings.model_ema and method.student is not method.cohort.target:
        raise RecipeError(f"{type(method).__name__} ships a moving average of its own: leave out --model-ema.")
    ema = ModelEmaV3(method.cohort.target, settings.model_ema_decay, use_warmup=True) if settings.model_ema else None
    return TrainState(method, optimizer, schedule, scaler, ema)


def facts(state: TrainState, run: Run) -> dict[str, Any]:
    """What a checkpoint and the run that continues it must have in common before weights are even compared."""
    return {
        "network": run.arch,
        "method": run.recipe.get("method", {}).get("name") or type(state.method).__name__,
        "task": state.method.task.name if state.method.task.name != tasks.DEFAULT else None,
        "optimizer": run.settings.opt,
        "model_ema": state.ema is not None,
        "freeze": sorted(run.settings.freeze) or None,
        "layer_decay": run.settings.layer_decay,
        "branch_lr_scale": run.settings.branch_lr_scale if run.settings.branch_lr_scale != 1 else None,
    }  # None where nothing is asked for, as in a checkpoint that is older than the setting


def _student(state: TrainState, run: Run) -> dict[str, Any]:
    """What ships, in timm's layout, the state dict being the target's alone."""
    payload = {
        "epoch": state.epoch - 1,  # the last one done, as in timm's version 2
        "arch": run.arch,
        "state_dict": state.method.cohort.target.state_dict(),
        "args": run.recipe,
        "version": 2,
        "metric": state.history[-1][run.metric] if state.history else None,
    }
    if state.student is not state.method.cohort.target:
        payload["state_dict_ema"] = state.student.state_dict()
    return payload


def _best(state: TrainState, run: Run) -> dict[str, Any]:
    """The student; also the method, where that gives further networks beside it."""
    return _student(state, run) | ({"method": state.method.state_dict()} if state.method.has_byproducts() else {})


def _payload(state: TrainState, run: Run) -> dict[str, Any]:
    """The student, and all that a run goes on with; what timm has no place for is under "okdc"."""
    payload = _student(state, run) | {"optimizer": state.optimizer.state_dict()}
    if state.scaler.is_enabled():
        payload["amp_scaler"] = state.scaler.state_dict()
    own = {name: getattr(state, name) for name in REMEMBERED}
    payload["okdc"] = {
        "facts": facts(state, run), "steps": run.steps, "devices": world(), "images": run.settings.images_per_step,
        "lr": run.settings.peak_lr, "draws": DRAWS, "method": state.method.state_dict(), "run": own,
        "proof": state.method.cohort.proof,
    }  # fmt: skip
    return payload


# Payloads by the file that each is for, in the order in which they are written, and how many of each file are kept.
Contents = dict[Path, tuple[dict[str, Any], int]]


def contents(state: TrainState, run: Run, best: bool = False) -> Contents:
    """What last.pth.tar holds, from which a run goes on, and with `best` model_best.pth.tar, which holds what ships."""
    # The best first: a run killed between the two resumes from the older last and writes the same best once more.
    first: Contents = {run.folder / checkpoint.BEST: (_best(state, run), 1)} if best else {}
    return first | {run.last: (_payload(state, run), run.settings.checkpoint_hist)}


def write(files: Contents) -> None:
    """Write each file whole or not at all; RunError when it cannot be written."""
    for path, (payload, keep) in files.items():
        checkpoint.save(path, payload, keep)


def save(state: TrainState, run: Run) -> None:
    """Write last.pth.tar here and now."""
    write(contents(state, run))
