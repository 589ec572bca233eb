"""The steps in order: recipe, data, network, cohort, training, strip, export, verification, report."""

from __future__ import annotations

import math
import platform
import shlex
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import okdc
from okdc import _byproducts, _teacher, assembly, deploy, methods, networks, report, runs, training
from okdc.data import Data, load, open_source
from okdc.deploy import hub
from okdc.errors import NetworkError
from okdc.methods import Method
from okdc.ranks import first, rank
from okdc.recipe import LOADER, DataSettings, NetworkSettings, Recipe, override, resolve
from okdc.recipe import load as load_recipe
from okdc.system.randomness import own_randomness, seed_everything
from okdc.training import checkpoint, launch
from okdc.training.machine import choose_device


@dataclass
class Result:
    """What a run gives back: the trained student, its figures (per cent), the run folder, what was verified."""

    student: nn.Module
    metrics: dict[str, Any]
    path: Path
    verification: dict[str, Any] | None
    data: Data
    recipe: Recipe
    arch: str
    byproducts: dict[str, nn.Module] = field(default_factory=dict)  # further networks of the same training, by name

    def export(self, **settings: Any) -> dict[str, Any]:
        """Write and verify the bundle in `path`/export; keywords are those of the recipe's export section."""
        wanted = override(self.recipe, settings).export
        with runs.alone(self.path):
            self.verification = _export(self.student, self.data, replace(self.recipe, export=wanted), self.path, self)
        return self.verification


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
    wanted = _recipe(model, loader, recipe or runs.recipe_of(resume), method, settings)
    wanted = replace(wanted, train=launch.as_started(wanted.train))
    chosen = wanted.method["name"]
    _teacher.check(wanted.cohort, chosen, methods.get(chosen).needs_teacher)
    arch = wanted.network.model
    with ExitStack() as held:  # so that no other process writes to the folder until the report is there
        with launch.joined(wanted.train), own_randomness():
            leads = rank() == 0  # of several processes the first writes, and exports alone
            folder, last = first(lambda: runs.choose(Path(output), wanted, experiment, resume))
            seed_everything(wanted.train.seed)
            target, data = assembly.network_and_data(model, loader, validation, wanted)
            with assembly.at_home(target) as settle:
                input_size, classes = data.preprocess["input_size"], len(data.classes)
                named = not isinstance(model, nn.Module)
                teacher = assembly.teacher(wanted, data, proved=last is not None)
                learner = assembly.method(target, wanted, input_size, classes, named, teacher, data.train_labels)
                facts = _student_facts(arch, isinstance(model, nn.Module), data)
                if leads:
                    print(_opening(learner, data, wanted, folder), file=sys.stderr, flush=True)
                try:
                    state = training.fit(
                        learner, data, wanted.train, folder, resume=last, arch=arch, recipe=wanted.to_dict(),
                        begin=lambda: runs.begin(folder, wanted, facts, held),
                    )  # fmt: skip
                    byproducts, lost = _byproducts.take(learner, folder, settle)
                finally:
                    learner.strip()
            target.load_state_dict(checkpoint.student_weights(checkpoint.load(folder / checkpoint.BEST)))
        metrics = _metrics(state.history, state.best_epoch, len(learner.cohort))
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
            result.verification = _export(result.student, data, wanted, folder, result)
            if (result.byproducts or lost) and formats.byproducts:
                further = [_byproducts.student_row(result.arch, result.student, data, result.verification)]
                further += _byproducts.export(result.byproducts, lost, data, formats, folder, _info(wanted, result))
    except deploy.UnfitError as error:
        result.verification = error.verification
        raise
    finally:  # a run that is trained has a report, also when its export failed: it says why
        report.write(folder, _facts(result, learner, history) | {"byproducts": further})


def export(
    source: str | Path | nn.Module,
    *,
    output: str | Path | None = None,
    model: str | None = None,
    push_to_hub: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a bundle of a run's student, a saved student or a named network, and verify it; returns the verification.

    output: the bundle's folder, by default `source`/export. model: the package.module:function that a run trained,
    which runs only if it is named here. push_to_hub: the repository (USER/NAME) on the Hugging Face hub that gets the
    bundle if it is fit to ship. settings: those of the recipe's export section, and `data`, the images to verify on (a
    run's own when not given).
    """
    if push_to_hub:
        hub.check(push_to_hub)
    name = type(source).__name__ if isinstance(source, nn.Module) else str(source)
    known = None if isinstance(source, nn.Module) else runs.read_student(Path(source))
    trained = load_recipe(Path(name) / runs.RECIPE, typed=None) if known else Recipe()
    wanted = override(trained, settings)
    if known and not known["rebuildable"]:
        raise NetworkError(
            f"{name} trained an object, which cannot be built again from here. Call .export() on the Result in "
            "Python, or name the network package.module:function when it is trained."
        )
    if isinstance(source, nn.Module):
        student = source
    else:
        saved = NetworkSettings(model=name, pretrained=not Path(name).exists())
        student = networks.load(saved, len(known["classes"]) if known else None, typed=[model])
    arch = known["arch"] if known else name
    network = replace(wanted.network if known else NetworkSettings(pretrained=True), model=arch)
    config = known["preprocess"] if known else networks.data_config(student, network)
    data = _images(wanted, config) if known or "data" in settings else None
    classes = known["classes"] if known else data.classes if data else _numbered(student, config)
    folder = Path(output) if output else (Path(name) if known else Path(Path(name).name)) / "export"
    info: dict[str, Any] = {"command": _command()}
    if known:
        same = wanted.data == trained.data  # of other images the report says nothing
        metrics = runs.read_metrics(Path(name)) if same else {}
        info |= {"recipe": wanted.to_dict(), "title": Path(name).name, "metrics": metrics}
    with runs.alone(folder.parent):
        verification = deploy.export_bundle(
            student,
            data,
            wanted.export,
            folder,
            arch=arch,
            model_args=networks.arguments(network),
            info=info,
            preprocess=config,
            classes=classes,
        )
    if push_to_hub:
        print(f"Pushed to {hub.push(folder, push_to_hub)}", file=sys.stderr)
    return verification


def verify(bundle: str | Path, *, device: str = "cpu", **settings: Any) -> dict[str, Any]:
    """Verify a bundle, or the bundle of a run, again on this machine; settings as for `export`."""
    folder = Path(bundle)
    run = folder if (folder / runs.STUDENT).is_file() else folder.parent
    folder = folder / "export" if run == folder else folder
    facts = deploy.read(folder)
    has_recipe = (run / runs.RECIPE).is_file()
    wanted = override(load_recipe(run / runs.RECIPE, typed=None) if has_recipe else Recipe(), settings)
    data = _images(wanted, facts["preprocess"]) if has_recipe or "data" in settings else None
    return deploy.verify_bundle(folder, data, wanted.export, device=device)


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


def _images(wanted: Recipe, config: dict[str, Any]) -> Data | None:
    """Validation images for a student that is already trained; None where they came from a loader, which is gone."""
    if wanted.data.data == LOADER:
        return None
    settings: DataSettings = replace(wanted.data, workers=0, resident="off")  # training images are hardly read
    source = open_source(settings, wanted.train.seed)
    size = wanted.train.validation_batch_size or wanted.train.batch_size
    config = {**config, "input_size": tuple(config["input_size"])}
    return load(
        source, settings, config, batch_size=1, validation_batch_size=size, seed=wanted.train.seed, device="cpu"
    )


def _export(student: nn.Module, data: Data, wanted: Recipe, folder: Path, result: Result) -> dict[str, Any]:
    return deploy.export_bundle(
        student, data, wanted.export, folder / "export", arch=result.arch,
        model_args=networks.arguments(wanted.network), info=_info(wanted, result),
    )  # fmt: skip


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


def _info(wanted: Recipe, result: Result) -> dict[str, Any]:
    title = runs.default_name(wanted)
    return {"command": _command(), "recipe": wanted.to_dict(), "title": title, "metrics": result.metrics}


def _numbered(student: nn.Module, config: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(i) for i in range(networks.check_input(student, config["input_size"]).shape[1]))


def _student_facts(arch: str, is_object: bool, data: Data) -> dict[str, Any]:
    preprocess = {k: list(v) if isinstance(v, tuple) else v for k, v in data.preprocess.items()}
    return {"arch": arch, "rebuildable": not is_object, "classes": list(data.classes), "preprocess": preprocess}


def _metrics(history: list[dict[str, Any]], best_epoch: int | None, members: int) -> dict[str, Any]:
    """The student's figures at the epoch whose weights ship (the last one if none was kept), and of the whole run."""
    best = history[-1 if best_epoch is None else best_epoch]
    return {
        "top1": _number(best.get("eval_top1")),
        "top5": _number(best.get("eval_top5")),
        "ensemble_top1": _number(best.get("top1/ensemble")) if members > 1 else None,
        "best_epoch": best["epoch"],
        "epochs": len(history),
        "train_loss": _number(history[-1].get("train_loss")),
        "seconds": sum(row.get("seconds") or 0 for row in history),
        "skipped_steps": sum(row.get("skipped_steps") or 0 for row in history),
    }


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _facts(result: Result, learner: Method, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that the report shows, as plain values."""
    cohort, wanted = learner.cohort, result.recipe
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
    name = wanted.method["name"]
    return {
        "title": f"{result.arch} · {name} · {result.data.name}",
        "network": {
            "name": result.arch, "params": cohort.costs[0].params, "flops": cohort.costs[0].flops,
            "input_size": list(result.data.preprocess["input_size"]), "cut": cohort.cut,
        },
        "method": {
            "name": name, "summary": methods.card(name).splitlines()[0],
            "settings": {k: v for k, v in wanted.method.items() if k != "name"},
        },
        "members": members,
        "trained_params": sum(p.numel() for p in learner.parameters() if p.requires_grad),
        "data": {
            "name": result.data.name, "classes": len(result.data.classes),
            "train_images": result.data.sizes[0], "validation_images": result.data.sizes[1],
        },
        "history": history, "metrics": result.metrics, "verification": result.verification,
        "baseline": runs.find_baseline(result.path, wanted), "command": _command(), "recipe": wanted.to_dict(),
        "environment": _environment(wanted), "okdc": okdc.__version__,
    }  # fmt: skip


def _command() -> str:
    """The command that was typed, where there was one."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return shlex.join(["okdc", *sys.argv[1:]]) if program in ("okdc", "okdc.exe") else f"python {program}"


def _environment(wanted: Recipe) -> dict[str, Any]:
    settings, device = wanted.train, choose_device(wanted.train.device)
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
