"""A run put back exactly to what it was when its checkpoint was saved, or refused; what is not as it was is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from okdc.errors import RunError
from okdc.ranks import world
from okdc.recipe import STREAMS, TrainSettings
from okdc.training import checkpoint
from okdc.training.optimizer import lay_out
from okdc.training.state import Run, TrainState, facts


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
    settings = _other_draws(saved, state, run) + _other_settings(payload["args"], run.recipe)
    return lost + other + settings + (_changed(saved, state, run) if moved else "")


def _put_back(state: TrainState, payload: dict[str, Any], path: Path, run: Run, moved: bool) -> None:
    """What `path` holds, once it is known to fit; `moved` to another number of devices."""
    saved = payload["okdc"]
    ways_out = f"Continue it as it was: okdc compress --resume {run.folder}, or start anew with --experiment NAME."
    for name, here in facts(state, run).items():
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
    _copy_kept(saved)
    state.method.load_state_dict(saved["method"])
    if state.scaler.is_enabled() and "amp_scaler" in payload:  # not when a run moves to a device without bfloat16
        state.scaler.load_state_dict(payload["amp_scaler"])
    if state.ema:
        state.ema.module.load_state_dict(payload["state_dict_ema"])
    for name, value in saved["run"].items():
        setattr(state, name, value)
    _rename_peers(state)


def _copy_kept(saved: dict[str, Any]) -> None:
    """Copies in the place of what is mapped from the file and would be kept as it is."""
    saved["run"] = tree_map_only(torch.Tensor, torch.clone, saved["run"])
    for name, value in saved["method"].items():
        if name.endswith("_extra_state"):
            saved["method"][name] = tree_map_only(torch.Tensor, torch.clone, value)


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


def _other_draws(saved: dict[str, Any], state: TrainState, run: Run) -> str:
    """That a run whose method compares images, or of a stream, goes on with others than as it began, in words."""
    needs = state.method.needs(**{k: v for k, v in run.recipe.get("method", {}).items() if k != "name"})
    streamed = run.recipe.get("data", {}).get("data", "").lower().startswith(STREAMS)
    drawn = {"the images that the method compares": (2, needs.pairs or needs.indices), "a stream": (3, streamed)}
    return "".join(
        f"\n  This okdc draws {what} in another order than the one that saved this, so that the run goes on with other "
        "ones."
        for what, (since, concerns) in drawn.items()
        if concerns and saved.get("draws", 1) < since
    )


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
        checkpoint.load(best, mapped=True)  # better now than when training is over
    except checkpoint.UnusableError:
        return f"{best.name} is damaged"
    return ""


def _changed(saved: dict[str, Any], state: TrainState, run: Run) -> str:
    """What is not as it was because a run goes on with another number of devices."""
    lr = run.settings.peak_lr
    moved = [
        (saved["devices"], world(), "devices"),
        (saved["images"], run.settings.images_per_step, "images per step"),
        (f"{saved['lr']:.4g}", f"{lr:.4g}", "as the learning rate of the schedule"),
        (f"{saved['run']['step']} of {saved['steps']}", f"{state.step} of {run.steps}", "steps of this epoch done"),
    ]
    return "".join(f"\n  {now} {what}, before {then}" for then, now, what in moved if then != now)
