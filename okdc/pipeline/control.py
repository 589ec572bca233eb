"""The control of a run: the same network, recipe and seed trained alone, in a run folder of its own beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from okdc import tasks
from okdc.errors import RecipeError
from okdc.pipeline import run_folder
from okdc.pipeline.compression import prepared, run
from okdc.pipeline.facts import command
from okdc.recipe import ExportSettings, Recipe, override
from okdc.system.saying import say

PLAIN = "baseline"


def train_control(recipe: Recipe, output: str | Path, experiment: str | None, resume: str | None) -> None:
    """Train the control of the run that is about to begin, in NAME-baseline beside its folder, unless there is one.

    Takes what `compress` takes. A control that was interrupted goes on. Nothing is exported of it.
    """
    if recipe.method["name"] == PLAIN:
        return
    recipe = replace(recipe, train=replace(recipe.train, eval_metric=tasks.metric(recipe)))  # as its report has it
    folder, _ = run_folder.choose(Path(output), recipe, experiment, resume)
    if run_folder.find_baseline(folder, recipe) is not None:
        return
    alone = replace(override(recipe, {"method": PLAIN}), export=ExportSettings(onnx=False, byproducts=False))
    say("First the baseline: the same network trained alone, to see what the other members add.")
    run(prepared(alone), folder.parent, f"{folder.name}-{PLAIN}", "auto", go_on=command())
    say(f"The baseline is done. Now the run, with the method `{recipe.method['name']}`.")


def refuse_processes() -> None:
    """RecipeError: several processes train one run, not two."""
    raise RecipeError(
        "--with-baseline trains the baseline in one process, and these are several. Leave it out, and train it "
        "by a command of its own; the report of the run has it."
    )
