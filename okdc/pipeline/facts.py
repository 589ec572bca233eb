"""What the report and the bundle say of a run, as plain values."""

from __future__ import annotations

import math
import platform
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

import okdc
from okdc import methods, tasks
from okdc.methods import Method
from okdc.pipeline import run_folder
from okdc.recipe import LOADER, Recipe, TrainSettings, override
from okdc.tasks.task import Task
from okdc.training import TrainState
from okdc.training.machine import choose_device

if TYPE_CHECKING:
    from okdc.pipeline.result import Result


def metrics_of(
    history: list[dict[str, Any]], best_epoch: int | None, members: int, task: Task | None = None
) -> dict[str, Any]:
    """The student's figures at the epoch whose weights ship (the last one if none was kept), and of the whole run."""
    best, task = history[-1 if best_epoch is None else best_epoch], task or tasks.get()
    return {
        **{name: _number(best.get(f"eval_{name}")) for name in task.metrics},
        f"ensemble_{task.metric}": _number(best.get(f"{task.metric}/ensemble")) if members > 1 else None,
        "best_epoch": best["epoch"] + 1,  # as people count
        "epochs": len(history),
        "train_loss": _number(history[-1].get("train_loss")),
        "seconds": sum(row.get("seconds") or 0 for row in history),
        "skipped_steps": sum(row.get("skipped_steps") or 0 for row in history),
    }


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def choice(settings: TrainSettings, state: TrainState) -> dict[str, Any]:
    """What the epoch whose weights ship was chosen by, and after which one the run stopped early, if it did."""
    early = state.stopped_early(settings)
    return {"eval_metric": settings.eval_metric} | ({"stopped_early": early} if early else {})


def facts_of_training(method: Method, state: TrainState) -> dict[str, Any]:
    """What the report shows of the training itself, so that nothing need keep that in memory."""
    cohort = method.cohort
    shared = {id(p) for p in cohort.target.parameters()}
    members = [
        {
            "name": cost.name,
            "role": "ships" if i == 0 else cost.grown or "the target's own tail again",
            "params": cost.params,
            "own_params": cost.own_params,
            "shared_params": sum(p.numel() for p in member.parameters() if id(p) in shared) if i else 0,
            "flops": cost.flops,
        }
        for i, (cost, member) in enumerate(zip(cohort.costs, cohort.members, strict=True))
    ]
    return {
        "cut": cohort.cut, "members": members, "confusion": state.confusion, "history": state.history,
        "trained_params": sum(p.numel() for group in state.optimizer.param_groups for p in group["params"]),
    }  # fmt: skip


def facts_of(result: Result, training: dict[str, Any]) -> dict[str, Any]:
    """Everything that the report shows, as plain values; `training` is what `facts_of_training` gave."""
    recipe, target = result.recipe, training["members"][0]
    name = recipe.method["name"]
    return {
        "title": f"{result.arch} · {name} · {result.data.name}",
        "network": {
            "name": result.arch, "params": target["params"], "flops": target["flops"],
            "input_size": list(result.data.preprocess["input_size"]), "cut": training["cut"],
        },
        "method": {
            "name": name, "summary": methods.card(name).splitlines()[0],
            "settings": {k: v for k, v in recipe.method.items() if k != "name"},
        },
        "members": training["members"], "trained_params": training["trained_params"],
        "data": {
            "name": result.data.name, "classes": len(result.data.classes),
            "train_images": result.data.sizes[0], "validation_images": result.data.sizes[1],
            "image_counts": result.data.image_counts, "unreadable": result.data.unreadable,
        },
        **result.task.detail(training["confusion"], result.data.classes), "task": result.task.name,
        "history": training["history"], "metrics": result.metrics, "verification": result.verification,
        "baseline": (control := run_folder.find_baseline(result.path, recipe)),
        "same_rate": same_rate(result.path, recipe) if control else None,
        "control_command": control_command(result.path, recipe),
        "command": typed(result.path), "again": again(result.path, recipe), "recipe": recipe.to_dict(),
        "environment": _environment(recipe), "okdc": okdc.__version__,
    }  # fmt: skip


def command() -> str:
    """The command that was typed, where there was one."""
    given = Path(sys.argv[0] if sys.argv and sys.argv[0] else "python")
    program = "okdc" if (given.name, given.parent.name) == ("__main__.py", "okdc") else given.name  # python -m okdc
    return shlex.join(["okdc", *sys.argv[1:]]) if program in ("okdc", "okdc.exe") else f"python {program}"


def typed(folder: Path) -> str:
    """The commands that made the run in `folder`, a line each: the one that began it, and those that went on."""
    return "\n".join((run_folder.read_student(folder) or {}).get("typed") or [command()])


def continuing(last: Path) -> str:
    """The command that goes on from `last`, the checkpoint of a run that was stopped: what was typed, if it was."""
    typed = shlex.split(command())
    if typed[:2] != ["okdc", "compress"]:
        return f"okdc compress --resume {shlex.quote(str(last))}"
    if any(word.partition("=")[0] == "--resume" for word in typed):
        return shlex.join(typed)
    return shlex.join([*typed[:2], "--resume", "auto", *typed[2:]])


def again(folder: Path, recipe: Recipe) -> str | None:
    """The command that makes the run of `folder` again, by its recipe; None where Python gave it objects."""
    return shlex.join(_by_recipe(folder, recipe)) if _is_named(folder, recipe) else None


def control_command(folder: Path, recipe: Recipe) -> str | None:
    """The command that trains the control of the run in `folder`, beside it; None where Python gave it objects."""
    if not _is_named(folder, recipe):
        return None
    name, alone = f"{folder.name}-baseline", override(recipe, {"method": "baseline"})
    return shlex.join([*_by_recipe(folder, alone), "--method", "baseline", "--experiment", name])


def same_rate(folder: Path, recipe: Recipe) -> str:
    """That the control of the run in `folder` had its learning rate, and what finds the rate of each."""
    told = (
        f"The baseline had the learning rate of the run, {recipe.train.peak_lr:.3g}. The best rate of plain training "
        "may be another, so a gain or loss may be that of the rate."
    )
    if not _is_named(folder, recipe):
        return told
    method = recipe.method["name"]
    trusted = run_folder.trusted(replace(recipe, method=recipe.method | {"name": "baseline"}))  # --methods names it
    compare = ["okdc", "compare", "--recipe", str(folder / run_folder.RECIPE), *trusted, "--methods", method]
    return f"{told} To find the rate of each, type: {shlex.join([*compare, '--tune', 'lr'])}"


def _is_named(folder: Path, recipe: Recipe) -> bool:
    return recipe.data.data != LOADER and bool((run_folder.read_student(folder) or {}).get("rebuildable"))


def _by_recipe(folder: Path, recipe: Recipe) -> list[str]:
    place = [] if folder.parent == Path("runs") else ["--output", str(folder.parent)]
    return ["okdc", "compress", "--recipe", str(folder / run_folder.RECIPE), *place, *run_folder.trusted(recipe)]


def _environment(recipe: Recipe) -> dict[str, Any]:
    settings, device = recipe.train, choose_device(recipe.train.device)
    return {
        "okdc": okdc.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "processes": f"{settings.devices} per node, {settings.nodes} node{'s' * (settings.nodes > 1)}",
        "images per step": settings.images_per_step,
        "learning rate": f"{settings.peak_lr:.4g}",
    }
