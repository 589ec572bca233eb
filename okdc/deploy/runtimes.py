"""Where exported files will run beside the backends that made them: the runtimes of `export/run_*.py`, found by name.

Each ONNX file in each of them, in each number type that it computes in here, is one more row of a verification, run in
a process of its own. export/README.md says what such a file has.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from okdc.errors import ExportError, nearest
from okdc.recipe import ExportSettings
from okdc.system import shipped
from okdc.system.wording import one_line, without_paths
from okdc.verification import Exported
from okdc.verification.alone import precisions
from okdc.verification.comparison import TOLERANCE
from okdc.verification.schema import Skipped, Verification

INSTALLED = "auto"  # in place of names: all that are installed
# Most digits first: the largest relative difference of the logits. What int8 may differ by is stated with its files.
_TOLERANCES = {"fp32": TOLERANCE, "fp16": 1e-2, "bf16": 5e-2, "int8": 0.0}


@dataclass(frozen=True)
class Runtime:
    """One runtime: the module in `export/run_NAME.py`."""

    name: str
    path: Path
    module: ModuleType

    @property
    def device(self) -> str:
        """The kind of device that it runs on."""
        return getattr(self.module, "DEVICE", "cpu")

    @property
    def tool(self) -> str:
        """What its file does in a bundle, for the model card."""
        return f"`from {self.path.stem} import runner`: how {self.module.NAME} was told to run the files here"


def known() -> dict[str, Runtime]:
    """Every runtime by its name."""
    files = sorted(shipped.folder("export").glob("run_*.py"))
    found = [Runtime(path.stem.removeprefix("run_"), path, shipped.load(path)) for path in files]
    return {runtime.name: runtime for runtime in found}


def asked(settings: ExportSettings) -> list[Runtime]:
    """The runtimes that settings ask for; raises ExportError for a name that is none's."""
    found = known()
    if settings.runtimes == [INSTALLED]:
        return [runtime for runtime in found.values() if runtime.module.available() is None]
    for name in settings.runtimes:
        if name not in found:
            names = f"{', '.join(found)}, or {INSTALLED} alone: all that are installed"
            raise ExportError(f"there is no runtime {name!r}; okdc has {names}.{nearest(name, found)}")
    return [found[name] for name in dict.fromkeys(settings.runtimes)]


def not_installed(settings: ExportSettings) -> list[Skipped]:
    """Which of the runtimes that are asked for are not installed, and what to type."""
    reasons = {runtime.name: runtime.module.available() for runtime in asked(settings)}
    return [{"target": name, "reason": reason} for name, reason in reasons.items() if reason is not None]


def not_run(verification: Verification, names: Collection[str]) -> str | None:
    """Why nothing was run in one of the runtimes `names`, in a sentence; None when all of them ran."""
    lost = next((each for each in verification["skipped"] if each["target"] in names), None)
    return f"nothing was run in {lost['target']}: {lost['reason']}" if lost else None


def rows(exported: Mapping[str, Exported], settings: ExportSettings) -> dict[str, Exported]:
    """What runs the exported ONNX files in the runtimes that are asked for and installed, by the rows.

    A file that is made for another kind of device than a runtime's is not for that.
    """
    found: dict[str, Exported] = {}
    for runtime in asked(settings):
        if runtime.module.available() is None:
            types, problem = _precisions(runtime)
            for name, file in exported.items():
                if not file.problem and file.path.suffix == ".onnx" and _is_for(file, runtime):
                    for each in types:
                        row = _row(file, runtime, each if len(types) > 1 else None, problem)
                        found[f"{name} in {row.runtime}"] = row
    return found


def add_programs(folder: Path, settings: ExportSettings) -> None:
    """The files of the runtimes that were run, for whoever deploys with them."""
    for runtime in asked(settings):
        if runtime.module.available() is None:
            shutil.copyfile(runtime.path, folder / runtime.path.name)


def _is_for(file: Exported, runtime: Runtime) -> bool:
    return getattr(file.module, "MADE_FOR", runtime.device) == runtime.device


def _precisions(runtime: Runtime) -> tuple[Sequence[str], str | None]:
    """The number types that a runtime computes in on this machine, or why that cannot be told: its rows fail by it."""
    try:
        return precisions(str(runtime.path)), None
    except RuntimeError as error:
        return ("fp32",), f"it cannot be started: {one_line(error)}"


def _row(file: Exported, runtime: Runtime, computes: str | None, problem: str | None) -> Exported:
    """A file in a runtime, judged by whichever has fewer digits: what is in the file, or what is computed in."""
    stored, digits = getattr(file.module, "PRECISION", "fp32"), list(_TOLERANCES)
    computed = computes or "fp32"
    own = (float(getattr(module, "TOLERANCE", TOLERANCE)) for module in (file.module, runtime.module))
    allowed = max(*own, _TOLERANCES[computed])
    return Exported(
        file.path,
        runtime.module,
        problem and without_paths(problem),
        tolerance=allowed,
        precision=max(stored, computed, key=digits.index),
        runtime=f"{runtime.module.NAME}, {computes}" if computes else runtime.module.NAME,
        options={"precision": computed},
    )
