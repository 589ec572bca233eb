"""The steps in order: recipe, data, network, cohort, training, strip, export, verification, report."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from okdc import deploy, methods, report, training
from okdc.data import Data
from okdc.methods import Method
from okdc.pipeline import assemble, assemble_cohort, run_folder, teachers
from okdc.pipeline.byproducts import export, student_row, take
from okdc.pipeline.facts import facts, metrics_of
from okdc.pipeline.result import Result, export_result, info
from okdc.ranks import first, rank
from okdc.recipe import LOADER, Recipe, override, resolve
from okdc.system.randomness import own_randomness, seed_everything
from okdc.training import checkpoint, launch
from okdc.training.machine import choose_device


def compress(
    model: str | nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    *,
    recipe: Recipe | str | Path | None = None,
    method: str | None = None,
    output: str | Path = "runs",
    experiment: str | None = None,
    resume: str | None = None,
    **settings: Any,
) -> Result:
    """Train a network together with branches that teach it, strip them, export and verify what is left.

    model: a name (timm, torchvision/NAME, package.module:function) or any module that returns logits (B, classes).
    loader, validation: any re-iterable of (images (B, C, H, W), labels (B,)); without them `data` names the images.
    settings: any setting of a recipe by its bare name (epochs=3, batch_size=64, members=4), and method_kwargs.
    A module that is given is trained in place and is the student that comes back; say pretrained=True if its weights
    are worth keeping, then branches start near them instead of anew. OkdcError says what to mend.
    """
    wanted = _recipe(model, loader, recipe or run_folder.recipe_of(resume), method, settings)
    wanted = replace(wanted, train=launch.as_started(wanted.train))
    chosen = wanted.method["name"]
    teachers.check(wanted.cohort, chosen, methods.get(chosen).needs_teacher)
    arch = wanted.network.model
    with ExitStack() as held:  # so that no other process writes to the folder until the report is there
        with launch.joined(wanted.train), own_randomness():
            leads = rank() == 0  # of several processes the first writes, and exports alone
            folder, last = first(lambda: run_folder.choose(Path(output), wanted, experiment, resume))
            seed_everything(wanted.train.seed)
            target, data = assemble.network_and_data(model, loader, validation, wanted)
            with assemble.at_home(target) as settle:
                input_size, classes = data.preprocess["input_size"], len(data.classes)
                named = not isinstance(model, nn.Module)
                teacher = assemble_cohort.teacher(wanted, data, proved=last is not None)
                learner = assemble_cohort.method(target, wanted, input_size, classes, named, teacher, data.train_labels)
                facts = _student_facts(arch, isinstance(model, nn.Module), data)
                if leads:
                    print(_opening(learner, data, wanted, folder), file=sys.stderr, flush=True)
                try:
                    state = training.fit(
                        learner, data, wanted.train, folder, resume=last, arch=arch, recipe=wanted.to_dict(),
                        begin=lambda: run_folder.begin(folder, wanted, facts, held),
                    )  # fmt: skip
                    byproducts, lost = take(learner, folder, settle)
                finally:
                    learner.strip()
            target.load_state_dict(checkpoint.student_weights(checkpoint.load(folder / checkpoint.BEST)))
        metrics = metrics_of(state.history, state.best_epoch, len(learner.cohort))
        result = Result(target.eval(), metrics, folder, None, data, wanted, arch, byproducts)
        if leads:
            _deliver(result, learner, state.history, lost)
    return result


def _deliver(result: Result, learner: Method, history: list[dict[str, Any]], lost: str | None) -> None:
    """Export and verify what was trained, by-products too (`lost` says why there are none), and report on the run."""
    data, wanted, folder = result.data, result.recipe, result.path
    further: list[dict[str, Any]] = []
    try:
        formats = wanted.export
        if any((formats.onnx, formats.fp16, formats.int8, formats.torch, formats.trt, formats.triton)):
            result.verification = export_result(result.student, data, wanted, folder, result)
            if (result.byproducts or lost) and formats.byproducts:
                further = [student_row(result.arch, result.student, data, result.verification)]
                further += export(result.byproducts, lost, data, formats, folder, info(wanted, result))
    except deploy.UnfitError as error:
        result.verification = error.verification
        raise
    finally:  # a run that is trained has a report, also when its export failed: it says why
        report.write(folder, facts(result, learner, history) | {"byproducts": further})


def _recipe(
    model: Any, loader: Any, recipe: Recipe | str | Path | None, method: str | None, settings: dict[str, Any]
) -> Recipe:
    flat = {"method": method, **settings}
    if isinstance(model, str):
        flat["model"] = model
    elif model is not None:
        flat["model"] = type(model).__name__
    if loader is not None:
        flat["data"] = LOADER
        flat.setdefault("batch_size", getattr(loader, "batch_size", None))  # the learning rate is scaled by it
    if isinstance(recipe, Recipe):
        return override(recipe, {k: v for k, v in flat.items() if v is not None}, methods.settings)
    return resolve(recipe, flat=flat, method_settings=methods.settings)


def _opening(learner: Method, data: Data, wanted: Recipe, folder: Path) -> str:
    """What is about to be trained, on what, and where it goes."""
    members = len(learner.cohort)
    others = f" with {members - 1} other{'s' * (members > 2)}" if members > 1 else ""
    return (
        f"{wanted.network.model}{others} by {wanted.method['name']} on {data.name}, {data.sizes[0]:,} training and "
        f"{data.sizes[1]:,} validation images, {len(data.classes)} classes, {_device(wanted)}, into {folder}"
    )


def _device(wanted: Recipe) -> str:
    device, settings = choose_device(wanted.train.device), wanted.train
    if (count := settings.devices * settings.nodes) == 1:
        return str(device)
    return f"{count} processes on {device.type}, {settings.images_per_step:,} images per step"


def _student_facts(arch: str, is_object: bool, data: Data) -> dict[str, Any]:
    preprocess = {k: list(v) if isinstance(v, tuple) else v for k, v in data.preprocess.items()}
    return {"arch": arch, "rebuildable": not is_object, "classes": list(data.classes), "preprocess": preprocess}
