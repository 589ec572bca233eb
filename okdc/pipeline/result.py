"""What a run gives back, and the bundle that is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from okdc import deploy, networks
from okdc.data import Data
from okdc.pipeline import run_folder
from okdc.pipeline.facts import command
from okdc.recipe import Recipe, override


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
        with run_folder.alone(self.path):
            self.verification = export_result(
                self.student, self.data, replace(self.recipe, export=wanted), self.path, self
            )
        return self.verification


def export_result(student: nn.Module, data: Data, wanted: Recipe, folder: Path, result: Result) -> dict[str, Any]:
    return deploy.export_bundle(
        student, data, wanted.export, folder / "export", arch=result.arch,
        model_args=networks.arguments(wanted.network), info=info(wanted, result),
    )  # fmt: skip


def info(wanted: Recipe, result: Result) -> dict[str, Any]:
    title = run_folder.default_name(wanted)
    return {"command": command(), "recipe": wanted.to_dict(), "title": title, "metrics": result.metrics}
