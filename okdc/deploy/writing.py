"""Writing the export targets that are asked for into a bundle, and finding them in one again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from okdc.deploy import bundle, requirements, targets, triton
from okdc.deploy.targets import Target
from okdc.recipe import ExportSettings
from okdc.system import saying, shipped
from okdc.system.wording import all_lines, one_line, without_paths
from okdc.tasks.task import Task
from okdc.verification import Exported, Gates
from okdc.verification.schema import Skipped, Verification

ERRORS = "export-errors.txt"
_LARGEST_BATCH = 32  # that an engine takes, and a server may put together, unless larger ones are asked for


def write(
    part: Path,
    student: nn.Module,
    arch: str,
    settings: ExportSettings,
    classes: Sequence[str],
    preprocess: dict,
    info: Mapping[str, Any],
    calibration: np.ndarray | None,
    without: str,
    device: str,
    task: Task,
) -> tuple[dict[str, Exported], list[Skipped], dict[str, Any]]:
    """Every file that is asked for, in `part`: the files by their rows, what is not available, each writer's notes.

    calibration: (N, C, H, W), training images, of which those beyond the number that settings say are for finetuning.
    without: why there is no int8 where there are none. device: what a file that is for one GPU is for.
    """
    largest = max([_LARGEST_BATCH, *settings.batch_sizes])
    metadata = bundle.metadata(arch, classes, preprocess, info)
    offered = _offered(settings, preprocess, metadata, calibration, largest, device, task)
    example = torch.zeros(2, *preprocess["input_size"])
    exported: dict[str, Exported] = {}
    reasons: dict[str, str] = {}
    notes: dict[str, Any] = {}
    wanted = targets.asked(settings)
    for number, target in enumerate(wanted, 1):
        saying.say(f"writing {number} of {len(wanted)}: {target.file}")
        reason = without if target.calibrated and calibration is None else _unavailable(target, reasons)
        if reason is not None:
            reasons[target.name] = without_paths(reason)
            continue
        path, problem = part / target.file, _unfounded(target, offered)
        if problem is None:
            # A writer takes what it has a keyword for; among that, the files of other targets.
            options = {key: offered[key] for key in target.options if key in offered}
            try:
                notes[target.name] = target.module.write(student, example, path, **options)
                offered[target.name] = path
            except NotImplementedError as error:  # the format has no way to say it, whatever the weights are
                reasons[target.name] = one_line(error)
                continue
            except Exception as error:  # an exporter may raise anything; the other files are still written
                problem = f"it could not be written: {one_line(error)}{_kept(part, target, error)}"
        exported[target.row] = Exported(path, target.module, problem, target.own(device))
    _add_programs(part, wanted, exported, bundle.is_known(preprocess), task.program)
    if settings.triton:
        triton.write(part, without_paths(arch), preprocess["input_size"], classes, largest)
    return exported, [{"target": name, "reason": reason} for name, reason in reasons.items()], notes


def further(exported: Mapping[str, Exported], device: str) -> dict[str, Exported]:
    """The further devices that files run on, where there is a GPU (`device` if it is one): other runners of the same
    file, by their rows."""
    found, number = {}, device.removeprefix("cuda") if device.startswith("cuda") else ""
    for target in targets.known().values() if torch.cuda.is_available() else ():
        file = exported.get(target.row)
        if file is not None and not file.problem:
            for kind, tolerance in target.devices.items():
                found[target.on(kind)] = replace(file, device=kind + number, tolerance=tolerance)
    return found


def existing(folder: Path, device: str) -> tuple[dict[str, Exported], list[Skipped]]:
    """The files that a bundle has, by their rows, and why some of them cannot be run here."""
    exported: dict[str, Exported] = {}
    skipped: list[Skipped] = []
    for name, target in targets.known().items():
        if (folder / target.file).exists():
            reason = target.module.available()
            if reason is None:
                exported[target.row] = Exported(folder / target.file, target.module, device=target.own(device))
            else:
                skipped.append({"target": name, "reason": without_paths(reason)})
    return exported, skipped


def unproved(verification: Verification, exported: Mapping[str, Exported]) -> set[str]:
    """The rows of files that could not be run here and were built from one that failed; "skipped" then says it, too."""
    known, skipped = targets.known(), {each["target"]: each for each in verification["skipped"]}
    failed = {row["name"] for row in verification["rows"] if not row["pass"]}
    found = set[str]()
    for target in known.values():
        sources = [known[name] for name in target.needs]
        lost = next((each.file for each in sources if each.row in failed), None)
        if lost and target.row in exported and target.row in skipped:
            skipped[target.row]["reason"] += f" {lost}, from which it was built, failed its gates: neither is in here."
            found.add(target.row)
    return found


def leave_out(folder: Path, rows: set[str]) -> None:
    """Delete everything that the targets of these rows wrote."""
    for target in targets.known().values():
        for name in target.files if target.row in rows else ():
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)


def _offered(
    settings: ExportSettings,
    preprocess: dict[str, Any],
    metadata: dict[str, str],
    calibration: np.ndarray | None,
    largest: int,
    device: str,
    task: Task,
) -> dict[str, Any]:
    """What a writer may take by keyword, beside the files of other targets. largest: number of images in a batch."""
    count = settings.calibration_images
    return {
        "opset": settings.opset,
        "preprocess": preprocess,
        "metadata": metadata,
        "profile": (1, 8, largest),
        "workspace": int(settings.workspace * 2**30),
        "device": device,
        "calibration": None if calibration is None else calibration[:count],
        "finetuning": None if calibration is None else calibration[count:],
        "same": task.tally().same,
        "activation": task.activation,
        "enough": min(100.0, Gates(min_agreement=settings.min_agreement).agreement("int8") + 2),
    }


def _unavailable(target: Target, skipped: Mapping[str, str]) -> str | None:
    """Why a target cannot be written here; None where it can."""
    lost = next((name for name in target.needs if name in skipped), None)
    return f"it is made from {lost}, which was skipped: {skipped[lost]}" if lost else target.module.available()


def _unfounded(target: Target, written: Mapping[str, Any]) -> str | None:
    """Which of the files that a target is made from could not be written."""
    lost = next((name for name in target.needs if name not in written), None)
    return f"it is made from {lost}, which could not be written" if lost else None


def _kept(part: Path, target: Target, error: Exception) -> str:
    """Where the whole of an error of several lines is now, in words."""
    whole = all_lines(error)
    if whole == one_line(error):
        return ""
    with open(part / ERRORS, "a", encoding="utf-8") as file:
        file.write(f"{target.file}\n\n{whole}\n\n")
    return f" (all of it: {ERRORS})"


def _add_programs(
    part: Path, wanted: Sequence[Target], exported: Mapping[str, Exported], known: bool, program: str
) -> None:
    """The export targets that are of use on the device, and predict.py where there is a file that it runs.

    known: whether the preprocessing is; predict.py would have to guess it. program: that of the task.
    """
    if known and any(target.predict and target.row in exported for target in wanted):
        text = shipped.program(shipped.folder("export") / program)
        (part / "predict.py").write_text(text, encoding="utf-8", newline="\n")
        files = [part / target.file for target in wanted if target.predict and (part / target.file).is_file()]
        (part / "requirements.txt").write_text(requirements.text(files), encoding="utf-8")
    for target in wanted:
        for name in (target.path.name, *target.beside) if target.tool else ():
            shutil.copyfile(target.path.with_name(name), part / name)
