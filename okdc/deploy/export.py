"""From a student to a bundle that is safe to ship: every file written, verified, and put in place all at once.

A bundle that fails a gate is kept beside (`export-failed/`), so that nothing is lost, and never replaces a good one.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from okdc import networks, tasks
from okdc.deploy import bundle, pipelines, runtimes, statement, torch_runner
from okdc.deploy.calibration import draw
from okdc.deploy.card import write_card
from okdc.deploy.collapse import is_fair, say_collapse
from okdc.deploy.machine import environment
from okdc.deploy.targets import asked, known
from okdc.deploy.writing import existing, further, leave_out, unproved, write
from okdc.errors import ExportError, GateError, OkdcError
from okdc.networks.saved import CONFIG
from okdc.recipe import ExportSettings
from okdc.system.wording import without_paths
from okdc.tasks.task import Task
from okdc.verification import Gates, compare, failed_row, take
from okdc.verification import torch_runner as run_torch
from okdc.verification.gates import fail, for_cpu, is_variant
from okdc.verification.schema import Calibration, DataFacts, Skipped, Verification, score

_A_FEW = 8  # training images, for the range of the activations
_TO_TRAIN = 1024  # further ones, where a file is finetuned
_NO_IMAGES = "int8 is calibrated on training images, and there are none: --data DATA"


class UnfitError(GateError):
    """A bundle that failed a gate, with the verification that says where."""

    def __init__(self, message: str, verification: Verification):
        super().__init__(message)
        self.verification = verification


def export_bundle(
    student: nn.Module,
    data: Any | None,
    settings: ExportSettings,
    folder: Path,
    *,
    arch: str,
    model_args: dict[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    device: str | None = None,
    task: Task | None = None,
) -> Verification:
    """Write the bundle of a student to `folder` and verify it; returns the verification.

    preprocess, classes: needed where there is no data to ask. info: title, command, recipe, metrics, of which that of
    the task (classification when not given) is held against what torch reaches here. device: that of the student when
    not given. What was asked for and is not available on this machine is in "skipped". Raises UnfitError, with the
    bundle in `failed_folder(folder)`, when something is not fit to ship, and ExportError when the folder is not a
    bundle's.
    """
    task, info = task or tasks.get(), {"licence": settings.license} | dict(info or {})
    preprocess = dict(preprocess or getattr(data, "preprocess", None) or {})
    classes = tuple(classes if classes is not None else getattr(data, "classes", ()))
    device = device or _device(student)
    bundle.recover(folder)
    bundle.refuse_foreign(folder)
    failed = failed_folder(folder)
    bundle.refuse_foreign(failed)
    network = _exportable(student, preprocess, classes, task)
    lacking = runtimes.not_installed(settings)  # and a name that is none's, before anything is written
    part = folder.absolute().with_name(f".{folder.name}.{os.getpid()}")  # absolute: so it is cut out of all messages
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.[0-9]*"):  # by an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        skipped = _write_student(part, student, network, arch, model_args, classes, preprocess, task)
        data = take(data, settings.images)
        calibration, drawn, without = _draw(data, settings)
        exported, unavailable, notes = write(
            part, network, arch, settings, classes, preprocess, info, calibration, without, device, task
        )
        if unavailable and not exported and (folder / CONFIG).is_file():
            reasons = "; ".join(f"{each['target']}: {each['reason']}" for each in unavailable)
            raise ExportError(f"no file that was asked for can be written here: {reasons}. {folder} is left as it was.")
        files, raw = pipelines.split(part, exported)
        reached = info.get("metrics", {}).get(task.metric)
        known_from = _data_facts(data)["images"] if settings.images else None
        verification = compare(
            network,
            files | further(files, device) | runtimes.rows(files, settings),
            data,
            input_size=preprocess["input_size"],
            device=device,
            batch_sizes=settings.batch_sizes,
            threads=settings.threads,
            gates=Gates(settings.max_drop, settings.min_agreement, reached, known_from),
            pipelines=raw,
            golden=bundle.read_golden(part),
            alone=_alone(part),
            task=task,
        )
        _add_failure(verification, "labels.txt", _wrong_labels(classes, data), task)
        untried = [*verification["skipped"], *pipelines.unchecked(part, raw, verification)]
        skipped = [*unavailable, *skipped, *lacking, *untried]
        verification |= {"skipped": skipped, "data": _data_facts(data), "exports": notes, "calibration": drawn}
        verification["parameters"] = sum(p.numel() for p in student.parameters())
        if verification["verdict"] != "fail":  # it ships without the variants that failed; their rows stay
            bad = {row["name"] for row in verification["rows"] if is_variant(row) and not row["pass"]}
            leave_out(part, bad | unproved(verification, exported))
        runtimes.add_programs(part, settings)
        _finish(part, arch, verification, info, task)
        bundle.replace_folder(part, failed if verification["verdict"] == "fail" else folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if verification["verdict"] == "fail":
        message = f"{failures(verification)} The files are kept in {failed}; nothing was put in {folder}."
        raise UnfitError(message, verification)
    return verification


def verify_bundle(folder: Path, data: Any | None, settings: ExportSettings, *, device: str = "cpu") -> Verification:
    """Verify an existing bundle again, on this machine and these data; nothing in the bundle is changed.

    The reference is torch with model.safetensors where timm or torchvision build the network, else stored logits.
    Other images than the export's may be harder: where its metric collapsed on them, its row says so, and may pass.
    Raises GateError if files changed since the export; a verdict "fail" is returned (`failures` words it).
    """
    problems = bundle.check_sums(folder)
    if problems:
        raise GateError(f"{folder} is not as it was exported: {', '.join(problems)}. Export it again: okdc export RUN")
    facts, task = read(folder), task_of(folder)
    recorded: Verification = bundle.read_json(folder / "verification.json")
    student = bundle.load_student(folder)
    exported, skipped = existing(folder, device)
    files, raw = pipelines.split(folder, exported)
    others = further(files, device) | runtimes.rows(files, settings)
    here = _data_facts(data)
    same_data = is_fair(recorded) and all(
        recorded["data"].get(key) == here[key]  # type: ignore[literal-required]
        for key in ("name", "images")
    )
    known = (
        next((score(row, task.metric) for row in recorded["rows"] if row["name"] == "torch"), None)
        if same_data
        else None
    )
    verification = compare(
        student,
        files | others,
        data,
        input_size=facts["preprocess"]["input_size"],
        device=device,
        images=settings.images,
        batch_sizes=settings.batch_sizes,
        threads=settings.threads,
        gates=Gates(settings.max_drop, settings.min_agreement, known, recorded["images"]),
        pipelines=raw,
        golden=bundle.read_golden(folder),
        alone=_alone(folder),
        task=task,
    )
    if not same_data:
        say_collapse(verification["rows"], verification["images"], recorded, len(facts["classes"]), task)
    odd, (wrong, other) = statement.contradictions(folder), statement.odd_programs(folder)
    _add_failure(verification, "labels.txt", odd.pop("labels.txt", None) or _wrong_labels(facts["classes"], data), task)
    for file, reason in (odd | wrong).items():
        _add_failure(verification, file, reason, task)
    # What stops nothing: providers, and in runtimes all but what was asked there, whether float32 files run.
    told = {name for name, each in others.items() if each.device or each.precision != "fp32"}
    if not all(row["pass"] for row in verification["rows"] if row["name"] not in told):
        verification["verdict"] = "fail"
    skipped += [
        *runtimes.not_installed(settings),
        *verification["skipped"],
        *pipelines.unchecked(folder, raw, verification),
        *(Skipped(target=name, reason=reason) for name, reason in other.items()),
    ]
    verification |= {"skipped": skipped, "data": _data_facts(data), "environment": environment(device)}
    return verification


def read(folder: Path) -> dict[str, Any]:
    """What a bundle says about itself: architecture, classes (tuple), preprocess; raises ExportError if it is none."""
    config = bundle.read_config(folder)
    preprocess = statement.read_preprocess(folder)
    return {"architecture": config["architecture"], "classes": statement.read_labels(folder), "preprocess": preprocess}


def task_of(folder: Path) -> Task:
    """What a bundle's network is for, with what was settled after its training; raises ExportError if it is none."""
    return tasks.of(bundle.read_config(folder).get("okdc", {}))


def failed_folder(folder: Path) -> Path:
    """Where a bundle that failed a gate is kept: `export-failed` beside `export`."""
    return folder.with_name(f"{folder.name}-failed")


def failures(verification: Verification) -> str:
    """The failed rows of a verification in words."""
    bad = [f"{row['name']}: {row['reason']}." for row in verification["rows"] if not row["pass"]]
    return f"{len(bad)} of {len(verification['rows'])} checks failed, so this is not fit to ship. {' '.join(bad)}"


def _exportable(student: nn.Module, preprocess: Mapping[str, Any], classes: Sequence[str], task: Task) -> nn.Module:
    """The student as a network of one output; ExportError unless it has one per class for an image of the stated size.

    It is the student itself, but for one that gives several outputs.
    """
    if "input_size" not in preprocess:
        raise ExportError("Export needs the size of the images: give data, or preprocess with input_size (C, H, W).")
    size = tuple(preprocess["input_size"])
    student = networks.single(student, size, task)
    with torch.inference_mode():
        shape = tuple(run_torch(student)(np.zeros((2, *size), dtype=np.float32)).shape)
    if shape[:2] != (2, len(classes)) or len(shape) != task.dims:
        several = task.nouns[1]
        raise ExportError(
            f"The network gives {shape} for two images of {size}, but there are {len(classes)} {several}."
        )
    return student


def _write_student(
    part: Path,
    student: nn.Module,
    network: nn.Module,
    arch: str,
    model_args: dict | None,
    classes: Sequence[str],
    preprocess: dict,
    task: Task,
) -> list[Skipped]:
    """Weights, configuration, classes and golden outputs; returns what of it cannot be had, as "skipped" entries.

    network: the student as `_exportable` gives it.
    """
    bundle.write_weights(student, part / bundle.WEIGHTS)
    bundle.write_golden(network, preprocess["input_size"], part / bundle.GOLDEN)
    bundle.write_config(student, part / CONFIG, arch, classes, preprocess, model_args, task.facts())
    for name, facts in task.files(torch.from_numpy(bundle.read_golden(part)[1])).items():
        bundle.write_json(part / name, facts)
    statement.write_preprocess(part, preprocess)
    statement.write_labels(part / statement.LABELS, classes)
    reason = bundle.settle_loader(part)
    return [{"target": bundle.WEIGHTS, "reason": reason}] if reason else []


def _draw(data: Any | None, settings: ExportSettings) -> tuple[np.ndarray | None, Calibration | None, str]:
    """Training images for int8, where they come from, and why there are none; a few for what can do without (fp16)."""
    wanted = asked(settings)
    if data is None or not any("calibration" in target.options for target in wanted):
        return None, None, _NO_IMAGES
    try:
        if any(target.calibrated for target in wanted):
            further = _TO_TRAIN if any("finetuning" in target.options for target in wanted) else 0
            return *draw(data, settings.calibration_images, further=further), ""
        return draw(data, _A_FEW, apart=False)[0], None, _NO_IMAGES
    except OkdcError as error:  # the other files need none
        return None, None, str(error)


def _alone(folder: Path) -> tuple[str, Path] | None:
    """What times the student in a process of its own, where timm or torchvision can build it there."""
    return (torch_runner.__name__, folder) if bundle.can_load(folder) else None


def _finish(part: Path, arch: str, verification: Verification, info: Mapping[str, Any], task: Task) -> None:
    """verification.json, what is recommended in config.json, the model card, and the check sums over everything."""
    verification["environment"] = environment(verification["device"])
    bundle.recommend(part, for_cpu(verification["rows"], {target.row for target in known().values() if target.predict}))
    statement.note_programs(part)
    bundle.write_json(part / "verification.json", verification)
    write_card(part, arch, bundle.read_config(part), verification, info, task)
    bundle.write_sums(part)


def _data_facts(data: Any | None) -> DataFacts:
    if data is None or data.validation is None:
        return {"name": None, "images": 0, "unreadable": {}}
    lost = getattr(data, "unreadable", {})  # only okdc's own data knows
    return {"name": without_paths(str(data.name)), "images": data.sizes[1], "unreadable": lost}


def _add_failure(verification: Verification, file: str, reason: str | None, task: Task) -> None:
    """Its row fails for a file in which `reason` is wrong, if anything is; a new one where it has none."""
    if reason is None:
        return
    row = next((row for row in verification["rows"] if row["name"] == file), None)
    if row is None:
        verification["rows"].append(failed_row(file, reason, task))
    else:
        fail(row, reason)
    verification["verdict"] = "fail"


def _wrong_labels(labels: Sequence[str], data: Any | None) -> str | None:
    """How the bundle's labels differ from the names of the data's classes, where these have names."""
    names = tuple(getattr(data, "classes", labels))
    numbers = tuple(str(index) for index in range(len(labels)))  # data without names; but they may be the names
    if names == tuple(labels) or (names == numbers and set(names) != set(labels)):
        return None
    if len(names) != len(labels):
        return f"it has {len(labels)} labels, the data {len(names)} classes"
    index = next(index for index, pair in enumerate(zip(labels, names, strict=True)) if pair[0] != pair[1])
    return f"its class {index} is {labels[index]!r}, the data's is {names[index]!r}"


def _device(student: nn.Module) -> str:
    parameter = next(student.parameters(), None)
    return str(parameter.device) if parameter is not None else "cpu"
