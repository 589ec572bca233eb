"""The steps in order: recipe, data, network, cohort, training, strip, export, verification, report."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from okdc import deploy, losses, methods, tasks, training
from okdc.data import Data
from okdc.errors import RecipeError, refuse_address
from okdc.methods import Method
from okdc.pipeline import (
    assemble,
    assemble_cohort,
    byproducts,
    class_weights,
    opening,
    presets,
    run_folder,
    settling,
    teachers,
)
from okdc.pipeline.delivering import deliver
from okdc.pipeline.facts import choice, command, continuing, facts_of_training, metrics_of, typed
from okdc.pipeline.result import Result
from okdc.ranks import first, rank
from okdc.recipe import (
    LOADER,
    STATED,
    DataSettings,
    Recipe,
    TrainSettings,
    flat_settings,
    load,
    override,
    preset_recipe,
    refuse_preset,
    resolve,
)
from okdc.system.randomness import own_randomness, seed_everything
from okdc.system.saying import forget, logged, say
from okdc.tasks.task import Task
from okdc.training import TrainState, checkpoint, launch, loggers
from okdc.training.evaluation import judge
from okdc.training.machine import Machine

log = logging.getLogger("okdc")


def compress(
    model: str | nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    preset: str | None = None,
    method: str | type[Method] | None = None,
    output: str | Path = "runs",
    experiment: str | None = None,
    resume: str | None = None,
    **settings: Any,
) -> Result:
    """Train a network together with branches that teach it, strip them, export and verify what is left.

    model: a name (timm, torchvision/NAME, package.module:function) or any module that returns logits (B, classes).
    loader, validation: any re-iterable of (images (B, C, H, W), labels (B,)); without them `data` names the images.
    method: a name, package.module:Class, path/to/file.py:Class, or the class itself.
    recipe, preset: what the settings change: a recipe, or finetune (from pre-trained weights, 20 epochs) or scratch.
    settings: any setting of a recipe by its bare name (epochs=3, batch_size=64, members=4), and method_kwargs.

    A module that is given is trained in place and is the student that comes back; say pretrained=True if its weights
    are worth keeping, then branches start near them instead of anew. OkdcError says what to mend.
    """
    refuse_address(output, "--output")
    refuse_address(resume, "--resume")
    resolved = prepared(recipe or run_folder.recipe_of(resume), model, loader, preset, method, settings)
    return run(resolved, output, experiment, resume, model, loader, validation)


def run(
    resolved: Recipe,
    output: str | Path,
    experiment: str | None,
    resume: str | None,
    model: str | nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    go_on: str | None = None,
) -> Result:
    """`compress` with a recipe that is `prepared`; `go_on` is what to type after a stop, if not what was typed."""
    with ExitStack() as held:  # so that no other process writes to the folder until the report is there
        held.callback(forget)
        with launch.joined(resolved.train), own_randomness():
            leads = rank() == 0  # of several processes the first writes, and exports alone
            folder, last = first(lambda: run_folder.choose(Path(output), resolved, experiment, resume))
            resolved = first(lambda: run_folder.as_begun(resolved, folder, last))
            names = first(lambda: loggers.chosen(resolved.train.log))
            if leads:
                _tell_unavailable(resolved)
            logs = held.enter_context(loggers.Loggers(names if leads else (), folder, resolved.to_dict()))
            seed_everything(resolved.train.seed)
            target, data = assemble.network_and_data(model, loader, validation, resolved)
            if last is None:
                assemble.refuse_unfit(target, data.preprocess["input_size"], resolved)
            named = not isinstance(model, nn.Module)
            go_on = go_on or continuing(folder / checkpoint.LAST)
            trained, state, further, lost = _train(target, data, resolved, folder, last, named, held, logs, go_on)
            task = trained.task
            target.load_state_dict(checkpoint.student_weights(checkpoint.load(folder / checkpoint.BEST, mapped=True)))
            metrics = metrics_of(state.history, state.best_epoch, len(trained.cohort), task)
            metrics |= choice(resolved.train, state)
            if leads and task.settles:
                settling.settle(task, copy.deepcopy(target), data, Machine.of(resolved.train))
                run_folder.note(folder, task.facts())
            if leads:
                metrics |= _test(target, data, resolved.train, state)
            facts = facts_of_training(trained, state)
            data.leave_device()
            data = replace(data, validation=data.test or data.validation, test=None)  # of which files are verified
            del trained, state
            launch.stay_until_closed(held)
        # The other processes end here. What trained is gone, so that a GPU is free while files are written on the CPU.
        gc.collect()
        torch.cuda.empty_cache()
        result = Result(target.eval(), metrics, folder, None, data, resolved, resolved.network.model, further, task)
        if leads:
            deliver(result, facts, lost, logs, go_on)
    return result


def prepared(
    recipe: Recipe | str | Path | None,
    model: Any = None,
    loader: Any = None,
    preset: str | None = None,
    method: str | type[Method] | None = None,
    settings: dict[str, Any] | None = None,
) -> Recipe:
    """The whole recipe: what is given in Python wins over it, and the launcher's number of processes over that."""
    settings = settings or {}
    flat: dict[str, Any] = {"method": methods.name_of(method) if method is not None else None, **settings}
    if isinstance(model, str):
        flat["model"] = model
    elif model is not None:
        flat["model"] = type(model).__name__
    if loader is not None:
        _refuse_data_settings(settings)
        flat["data"] = LOADER
        flat.setdefault("batch_size", getattr(loader, "batch_size", None))  # the learning rate is scaled by it
    make = partial(resolve, flat=flat, method_settings=methods.settings, source="okdc.compress")
    if preset is not None:
        refuse_preset(preset, recipe)
        named = not isinstance(model, nn.Module)  # a module has the weights that it has
        resolved = presets.settle(preset, make, settings)[1] if named else make(preset_recipe(preset))
    elif isinstance(recipe, Recipe):
        resolved = override(
            recipe, {k: v for k, v in flat.items() if v is not None}, methods.settings, source="okdc.compress"
        )
    else:
        resolved = make(recipe)
    if loader is not None:
        resolved = replace(resolved, data=_said_of_loader(resolved.data, recipe, settings))
    resolved = replace(resolved, train=launch.as_started(resolved.train))
    name, task = resolved.method["name"], tasks.get(resolved.network.task)
    methods.refuse_task(name, task)
    _refuse_settings(resolved, task)
    resolved = replace(resolved, train=replace(resolved.train, eval_metric=tasks.metric(resolved)))
    teachers.check(resolved.cohort, name, methods.get(name).needs_teacher)
    return resolved


def _refuse_settings(recipe: Recipe, task: Task) -> None:
    """RecipeError for settings that have no meaning for the task, and for a metric that it does not have."""
    sections, defaults = recipe.to_dict(), Recipe().to_dict()
    for name, reason in task.unsupported.items():
        section, _ = flat_settings()[name]
        if sections[section][name] not in (None, defaults[section][name]):
            raise RecipeError(f"--{name.replace('_', '-')} is not for --task {task.name}: {reason}.")
    chosen = recipe.train.eval_metric
    if chosen is not None and chosen not in task.metrics:
        raise RecipeError(
            f"--eval-metric {chosen}: --task {task.name} has no such metric; expected {' or '.join(task.metrics)}."
        )


def _said_of_loader(data: DataSettings, recipe: Recipe | str | Path | None, given: Mapping[str, Any]) -> DataSettings:
    """Settings without the preprocessing that a recipe has for its own data; with what is given of the loader's."""
    began = recipe if recipe is None or isinstance(recipe, Recipe) else load(recipe, typed=None)
    if began is not None and began.data.data == LOADER:
        return data
    nobody: dict[str, Any] = {name: None for name in STATED if given.get(name) is None}
    return replace(data, **nobody)


def _tell_unavailable(recipe: Recipe) -> None:
    """Say before training, not after it, which files and runtimes that were asked for are not to be had here."""
    for each in deploy.not_installed(recipe.export):
        say(f"The run's files will not be verified in {each['target']}: {each['reason']}")
    for name, reason in deploy.unavailable(recipe.export).items():
        say(f"The run will ship without a {name} file, which cannot be written here: {reason}")


def _refuse_data_settings(given: Mapping[str, Any]) -> None:
    """RecipeError for settings of the data that were given beside a loader, which makes its batches without them.

    Those of `STATED` may be: they say what the loader does, for the bundle.
    """
    sections = flat_settings()
    names = [name for name, value in given.items() if value is not None and sections.get(name, ("",))[0] == "data"]
    names = [name for name in names if name not in STATED]
    if names:
        raise RecipeError(
            f"{' and '.join(names)} cannot act on a loader of your own, which makes its batches as it was written: do "
            "it there and leave the setting out, or give data=FOLDER instead of the loader."
        )


def _train(
    target: nn.Module,
    data: Data,
    recipe: Recipe,
    folder: Path,
    last: Path | None,
    named: bool,
    held: ExitStack,
    logs: loggers.Loggers,
    go_on: str,
) -> tuple[Method, TrainState, dict[str, nn.Module], str | None]:
    """Build the cohort around the target, train and strip it; also the by-products, and why there are none."""
    weights = class_weights.of(recipe, data)
    with assemble.at_home(target, recipe.train) as settle, losses.weighted(weights):
        teacher = assemble_cohort.load_teacher(recipe, data, proved=last is not None)
        method = assemble_cohort.build_method(
            target,
            recipe,
            data.preprocess["input_size"],
            len(data.classes),
            named,
            teacher,
            data.train_labels,
            data.noted,
            assemble_cohort.proved_once(recipe, last),
        )
        student = _student_facts(recipe.network.model, named, data, method.task.facts())
        student["typed"] = [*(typed(folder).splitlines() if last else ()), command()]
        if rank() == 0:
            say(opening.opening(method, data, recipe, folder))
            if last is None and (hint := opening.steep(method, recipe)):
                log.warning("%s", hint)
        try:
            state = training.fit(
                method, data, recipe.train, folder, resume=last, arch=recipe.network.model, recipe=recipe.to_dict(),
                begin=lambda: _begin(folder, recipe, student, held), loggers=logs, go_on=go_on,
            )  # fmt: skip
            return method, state, *byproducts.take(method, folder, settle)
        finally:
            method.strip()


def _begin(folder: Path, recipe: Recipe, student: dict[str, Any], held: ExitStack) -> None:
    run_folder.begin(folder, recipe, student, held)
    held.enter_context(logged(folder / run_folder.LOG))


def _test(target: nn.Module, data: Data, settings: TrainSettings, state: TrainState) -> dict[str, Any]:
    """The student's figures on the validation images, where others than those have picked its epoch."""
    if data.test is None:
        return {}
    judged, state.confusion = judge(copy.deepcopy(target), data.test, Machine.of(settings), state.method.task)
    return judged | {"holdout": state.best}


def _student_facts(arch: str, rebuildable: bool, data: Data, task: dict[str, Any]) -> dict[str, Any]:
    preprocess = {k: list(v) if isinstance(v, tuple) else v for k, v in data.preprocess.items()}
    return {"arch": arch, "rebuildable": rebuildable, "classes": list(data.classes), "preprocess": preprocess} | task
