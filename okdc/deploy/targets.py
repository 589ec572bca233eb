"""Which files a student can be written to: the export targets, what each declares, and which of them settings ask for.

They are the files of `export/`, found by their names; export/README.md says what one may declare.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from okdc.deploy import triton
from okdc.errors import ExportError, nearest
from okdc.recipe import ExportSettings
from okdc.system import shipped
from okdc.verification.schema import Verification


@dataclass(frozen=True)
class Target:
    """One export target: the module in `export/to_NAME.py`, and what the constants at its top declare."""

    name: str
    path: Path
    module: ModuleType
    file: str  # what it writes, a file or a folder of the bundle
    description: str  # of that, for the model card
    also: Mapping[str, str]  # what else it writes, and how the card describes it
    tool: str | None  # what its own file does beside the bundle's, to which it is then copied
    beside: tuple[str, ...]  # files of `export/` that go with the tool
    asked_by: tuple[str, ...]  # the settings that together ask for it
    needs: tuple[str, ...]  # the targets that must be written for it
    row: str  # what its row of a verification is called
    precision: str  # that it is sold as: fp32, fp16, int8
    calibrated: bool  # not to be written without training images
    predict: bool  # whether predict.py runs it: by onnxruntime, on a CPU
    raw: bool  # whether it takes decoded images of any size, uint8 (B, H, W, C), instead of the network's input
    devices: Mapping[str, float | None]  # on which it runs too, in a row each, and the tolerance of its logits there
    packages: tuple[str, ...]  # whose versions a verification tells
    runs_on: str | None  # the kind of device without which it can be written, and not be run

    @property
    def files(self) -> dict[str, str]:
        """Everything that it writes, each with its description."""
        return {self.file: self.description, **self.also}

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """What its `write` takes by keyword."""
        return inspect.signature(self.module.write).parameters

    def own(self, device: str) -> str | None:
        """The device that its file is for whatever the others run on, `device` if that is of the kind."""
        return device if self.runs_on and device.startswith(self.runs_on) else self.runs_on

    def on(self, device: str) -> str:
        """What the row of one of its further devices is called."""
        return f"{self.row} on {device}"


def known() -> dict[str, Target]:
    """Every export target by its name, after those from whose files it is made, else in the order of the alphabet."""
    found = {target.name: target for target in map(_declared, sorted(shipped.folder("export").glob("to_*.py")))}
    ordered: dict[str, Target] = {}

    def place(target: Target, waiting: tuple[str, ...]) -> None:
        if target.name in waiting:
            raise ExportError(f"Each of these export targets is made from another: {', '.join(waiting)}. Mend NEEDS.")
        for name in found:
            if name in target.needs or name in target.options:
                place(found[name], (*waiting, target.name))
        ordered.setdefault(target.name, target)

    for target in found.values():
        if lost := set(target.needs) - set(found):
            names = ", ".join(found)
            raise ExportError(f"{target.path.name} needs {lost.pop()!r}, which is no export target: {names}.")
        place(target, ())
    return ordered


def find(name: str) -> Target:
    """The export target of that name; raises ExportError if there is none."""
    found = known()
    if name not in found:
        raise ExportError(f"There is no export target {name!r}; okdc has {', '.join(found)}.{nearest(name, found)}")
    return found[name]


def asked(settings: ExportSettings) -> list[Target]:
    """The export targets that settings ask for, and those that these need, in the order of writing.

    Raises ExportError for a target that no setting could ever ask for.
    """
    found = known()
    for target in found.values():
        for setting in target.asked_by:
            if not hasattr(settings, setting):
                raise ExportError(
                    f"{target.path.name} is asked for by {setting!r}, which is no setting: add a field of that name to "
                    "ExportSettings (okdc/recipe/sections.py), or say in ASKED_BY which ones ask for it."
                )
    names = {name for name, target in found.items() if all(getattr(settings, each) for each in target.asked_by)}
    names |= set(triton.NEEDS) if settings.triton else set()
    for name in reversed(found):  # what is needed comes before
        names |= set(found[name].needs) if name in names else set()
    return [target for name, target in found.items() if name in names]


def unavailable(settings: ExportSettings) -> dict[str, str]:
    """Why export targets that settings ask for cannot be written on this machine, by their names."""
    reasons = {target.name: target.module.available() for target in asked(settings)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def not_written(verification: Verification, typed: Collection[str]) -> str | None:
    """Why a file that the settings `typed` ask for is not there, in a sentence; None when nothing is missing."""
    reasons = {each["target"]: each["reason"] for each in verification["skipped"]}
    for name, target in known().items():
        if name in reasons and set(target.asked_by) <= set(typed):
            return f"no {' '.join(target.asked_by)} file was written: {reasons[name]}"
    return None


def _declared(path: Path) -> Target:
    module, name = shipped.load(path), path.stem.removeprefix("to_")

    def constant(called: str, default: Any) -> Any:
        return getattr(module, called, default)

    return Target(
        name=name,
        path=path,
        module=module,
        file=module.FILE,
        description=module.DESCRIPTION,
        also=constant("ALSO", {}),
        tool=constant("TOOL", None),
        beside=constant("BESIDE", ()),
        asked_by=constant("ASKED_BY", (name,)),
        needs=constant("NEEDS", ()),
        row=constant("ROW", name),
        precision=constant("PRECISION", "fp32"),
        calibrated=constant("CALIBRATED", False),
        predict=constant("PREDICT", False),
        raw=constant("RAW", False),
        devices=constant("DEVICES", {}),
        packages=constant("PACKAGES", ()),
        runs_on=constant("RUNS_ON", None),
    )
