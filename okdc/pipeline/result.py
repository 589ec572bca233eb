"""What a run gives back, and the bundle that is made of it."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from okdc import deploy, networks, report, tasks
from okdc.data import Data, state
from okdc.pipeline import run_folder
from okdc.pipeline.facts import typed
from okdc.recipe import STATED, ExportSettings, Recipe, override
from okdc.tasks.task import Task

if TYPE_CHECKING:
    from okdc.verification.schema import Verification


@dataclass(repr=False)
class Result:
    """What a run gives back: the trained student, its figures (per cent), the run folder, what was verified."""

    student: nn.Module
    metrics: dict[str, Any]
    path: Path
    verification: Verification | None
    data: Data
    recipe: Recipe
    arch: str
    byproducts: dict[str, nn.Module] = field(default_factory=dict)  # further networks of the same training, by name
    task: Task = field(default_factory=tasks.get)

    def __repr__(self) -> str:
        verdict = self.verification["verdict"].replace("_", " ") if self.verification else "nothing exported"
        reached = self.metrics.get(self.task.metric)
        figure = "" if reached is None else f"{self.task.word} {reached:.2f} %, "
        name = self.recipe.method["name"]
        return f"<Result: {self.arch} by {name} on {self.data.name}, {figure}{verdict}, in {self.path}>"

    def _repr_html_(self) -> str | None:
        return report.of_run(self.path)

    def show(self) -> None:
        """Open the report in a browser."""
        webbrowser.open((self.path / "report.html").absolute().as_uri())

    def export(self, **settings: Any) -> Verification:
        """Write and verify the bundle in `path`/export; keywords are those of the recipe's export section.

        Also mean, std, interpolation and crop_pct, which say what a loader of one's own does, for the bundle.
        """
        if stated := {name: settings.pop(name) for name in STATED if name in settings}:
            self.data = state(self.data, stated)
        with run_folder.alone(self.path):
            self.verification = self.bundle(override(self.recipe, settings).export)
        return self.verification

    def bundle(self, settings: ExportSettings) -> Verification:
        """The same with settings that are whole, for whoever holds the run folder already."""
        return deploy.export_bundle(
            self.student, self.data, settings, self.path / "export", arch=self.arch,
            model_args=networks.arguments(self.recipe.network), info=self.info(), task=self.task,
        )  # fmt: skip

    def info(self) -> dict[str, Any]:
        """What a bundle's card says of the run."""
        recipe = self.recipe
        title, told = run_folder.default_name(recipe), recipe.to_dict()
        return {"command": typed(self.path), "recipe": told, "title": title, "metrics": self.metrics}
