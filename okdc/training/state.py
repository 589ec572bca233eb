"""What a training run is: built from its settings, written to a checkpoint, and put back exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from okdc import tasks
from okdc.errors import RecipeError, RunError
from okdc.ranks import world
from okdc.recipe import TrainSettings
from okdc.system import files
from okdc.training import checkpoint
from okdc.training.machine import Machine
from okdc.training.optimizer import lay_out, make_optimizer, make_schedule
from okdc.training.progress import Row
from okdc.training.rates import plain

if TYPE_CHECKING:
    from okdc.methods import Method


# What a checkpoint holds of a state beside those of the parts that have a state_dict.
REMEMBERED = (
    "epoch", "step", "sums", "skipped_in_a_row", "best", "best_epoch", "confusion", "history", "between",
)  # fmt: skip


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
        """Until the run is complete, at the pace of this epoch's steps and with as long between epochs as last time."""
        pace = self.sums["seconds"] / (self.sums["steps"] + self.sums["skipped"])
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


def _facts(state: TrainState, run: Run) -> dict[str, Any]:
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


def _payload(state: TrainState, run: Run) -> dict[str, Any]:
    """timm's layout, the state dict being the target's alone; what timm has no place for is under "okdc"."""
    payload = {
        "epoch": state.epoch - 1,  # the last one done, as in timm's version 2
        "arch": run.arch,
        "state_dict": state.method.cohort.target.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "args": run.recipe,
        "version": 2,
        "metric": state.history[-1][run.metric] if state.history else None,
    }
    if state.scaler.is_enabled():
        payload["amp_scaler"] = state.scaler.state_dict()
    if state.student is not state.method.cohort.target:
        payload["state_dict_ema"] = state.student.state_dict()
    own = {name: getattr(state, name) for name in REMEMBERED}
    payload["okdc"] = {
        "facts": _facts(state, run), "steps": run.steps, "devices": world(), "images": run.settings.images_per_step,
        "lr": run.settings.peak_lr, "method": state.method.state_dict(), "run": own,
    }  # fmt: skip
    return payload


def save(state: TrainState, run: Run, best: bool = False) -> None:
    """Write last.pth.tar and, with `best`, model_best.pth.tar, which is the same file."""
    payload, keep = _payload(state, run), run.settings.checkpoint_hist
    if not best:
        checkpoint.save(run.last, payload, keep)
        return
    # The best first: a run killed between the two resumes from the older last and writes the same best once more.
    checkpoint.save(run.folder / checkpoint.BEST, payload)
    files.duplicate(run.folder / checkpoint.BEST, run.last, keep)


def restore(state: TrainState, payload: dict[str, Any], path: Path, run: Run) -> str:
    """Put the state back to what it was when `path` was saved; RunError when it is of another run.

    Returns in words what is not as it was: another number of devices, and a best checkpoint that is lost.
    """
    saved = payload["okdc"]
    moved = "devices" in saved and saved["devices"] != world()
    made = [dict(group) for group in state.optimizer.param_groups]
    _put_back(state, payload, path, run, moved)
    anew = moved or saved.get("lr", run.settings.peak_lr) != run.settings.peak_lr
    other = _other_metric(state, payload, run)
    lost = _lost_best(run) if state.history else ""
    if lost and state.is_over(run.settings):
        early = state.stopped_early(run.settings)
        longer = "a larger --patience" if early else f"--epochs {state.epoch + 1}"
        raise RunError(
            f"{path} is of a finished run whose {lost}. Put a good copy of it there, or train on with {longer}: the "
            "next epoch is then kept as the best."
        )
    if lost:
        state.best, lost = None, f"\n  The {lost}, so the next epoch is kept as the best."
    state.method.epochs.fill_(run.settings.epochs)
    if moved:
        before, now = saved["images"], run.settings.images_per_step
        state.step = min(run.steps, state.step * before // now)
    _take_up(state.optimizer, made, payload["args"].get("train", {}), run.settings, anew)
    if state.schedule is not None and (state.epoch or anew):  # the same rate again, unless the run is longer now
        state.schedule.step(state.epoch)
        state.schedule.step_update(state.epoch * run.steps + state.step)
    settings = _other_settings(payload["args"], run.recipe)
    return lost + other + settings + (_changed(saved, state, run) if moved else "")


def _put_back(state: TrainState, payload: dict[str, Any], path: Path, run: Run, moved: bool) -> None:
    """What `path` holds, once it is known to fit; `moved` to another number of devices."""
    saved = payload["okdc"]
    ways_out = f"Continue it as it was: okdc compress --resume {run.folder}, or start anew with --experiment NAME."
    for name, here in _facts(state, run).items():
        if saved["facts"].get(name) != here:
            raise RunError(f"{path} has {name} {saved['facts'].get(name)!r}, this run {here!r}. {ways_out}")
    if difference := checkpoint.difference(saved["method"], state.method.state_dict()):
        raise RunError(f"{path} does not fit this network and method: {difference}. {ways_out}")
    if saved["run"]["step"] and saved["steps"] != run.steps and not moved:
        raise RunError(
            f"{path} was saved within an epoch of {saved['steps']} steps, this run has {run.steps} to the epoch: the "
            f"data or batch size differs. {ways_out}"
        )
    try:
        state.optimizer.load_state_dict(payload["optimizer"])
    except (KeyError, ValueError) as error:
        raise RunError(f"the optimizer state of {path} does not fit: {error}. {ways_out}") from error
    lay_out(state.optimizer)
    state.method.load_state_dict(saved["method"])
    if state.scaler.is_enabled() and "amp_scaler" in payload:  # not when a run moves to a device without bfloat16
        state.scaler.load_state_dict(payload["amp_scaler"])
    if state.ema:
        state.ema.module.load_state_dict(payload["state_dict_ema"])
    for name, value in saved["run"].items():
        setattr(state, name, value)
    _rename_peers(state)


def _rename_peers(state: TrainState) -> None:
    """Let the columns of a checkpoint that is older than the names of peers, then branches too, have their names."""
    now = {f"branch{i}": name for i, name in enumerate(state.method.cohort.names) if name == f"peer{i}"}
    if not any(f"top1/{old}" in row for row in state.history for old in now):
        return

    def renamed(values: dict[str, Any]) -> dict[str, Any]:
        return {re.sub(r"\bbranch\d+", lambda old: now.get(old[0], old[0]), key): v for key, v in values.items()}

    state.sums, state.history = renamed(state.sums), [renamed(row) for row in state.history]


def _take_up(
    optimizer: torch.optim.Optimizer, made: list[dict[str, Any]], before: dict[str, Any], now: TrainSettings, anew: bool
) -> None:
    """Let an optimizer that was put back have what it was `made` with where a setting is another than `before`."""
    settings = {"weight_decay": "weight_decay", "momentum": "momentum", "betas": "opt_betas", "eps": "opt_eps"}
    values = {name: getattr(now, setting) for name, setting in settings.items()}
    names = [name for name, value in values.items() if before.get(settings[name], value) != value]
    if before.get("opt_kwargs", now.opt_kwargs) != now.opt_kwargs:
        names += now.opt_kwargs
    for group, new in zip(optimizer.param_groups, made, strict=True):
        group.update({name: new[name] for name in [*names, *(["lr"] if anew else [])] if name in new})


def _other_metric(state: TrainState, payload: dict[str, Any], run: Run) -> str:
    """Judge the best epoch so far, whose weights are kept, by the metric of now; in words where that is another one."""
    before = payload["args"].get("train", {}).get("eval_metric") or state.method.task.metric
    if before == run.settings.eval_metric or state.best_epoch is None:
        return ""
    state.best = state.history[state.best_epoch].get(run.metric)
    return f"\n  The best epoch so far was chosen by {before}; from here on {run.settings.eval_metric} chooses."


def _other_settings(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that are others than when the run was saved, in words."""
    found = [
        f"\n  {section}.{name} is {value!r} from here on, before it was {before[section][name]!r}."
        for section, settings in now.items()
        for name, value in settings.items()
        if name in before.get(section, {}) and before[section][name] != value
    ]
    return "".join(found)


def _lost_best(run: Run) -> str:
    """That the best checkpoint is not there or cannot be read, in words; nothing where it can be."""
    best = run.folder / checkpoint.BEST
    if not best.is_file():
        return f"{best.name} is gone"
    try:
        checkpoint.load(best)  # better now than when training is over
    except checkpoint.UnusableError:
        return f"{best.name} is damaged"
    return ""


def _changed(saved: dict[str, Any], state: TrainState, run: Run) -> str:
    """What is not as it was because a run goes on with another number of devices."""
    lr = run.settings.peak_lr
    facts = [
        (saved["devices"], world(), "devices"),
        (saved["images"], run.settings.images_per_step, "images per step"),
        (f"{saved['lr']:.4g}", f"{lr:.4g}", "as the learning rate of the schedule"),
        (f"{saved['run']['step']} of {saved['steps']}", f"{state.step} of {run.steps}", "steps of this epoch done"),
    ]
    return "".join(f"\n  {now} {what}, before {then}" for then, now, what in facts if then != now)
