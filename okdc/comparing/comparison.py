"""`okdc compare`: every method and its controls, seed by seed, and one table of what came of it."""

from __future__ import annotations

import copy
import time
import webbrowser
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from okdc import methods as known
from okdc import networks, pipeline, report, tasks
from okdc.comparing import arms, table, tuning
from okdc.comparing.arms import Arm
from okdc.comparing.running import InProcess, Job, refuse_others, run_all, seeded
from okdc.comparing.table import Line
from okdc.comparing.warned import Warned, warned
from okdc.data import open_source
from okdc.errors import RecipeError
from okdc.measure import estimate
from okdc.measure.estimate import Estimate
from okdc.methods import Method
from okdc.pipeline import assemble_cohort, facts, run_folder
from okdc.recipe import LOADER, ExportSettings, Recipe, flat_settings, resolve
from okdc.system.saying import forget, say

METHODS = ("one", "dml", "ahbf")
Score = Callable[[dict[str, Any], str], float | None]
NOTHING = ExportSettings(onnx=False, byproducts=False)


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` gives back: the lines, best first, what to use in a sentence, what runs warned of, and where
    everything is."""

    path: Path
    metric: str
    lines: list[Line]
    verdict: str
    images: int | None = None  # that the figures are of
    recipe: dict[str, Any] = field(default_factory=dict)  # of plain training
    warnings: list[Warned] = field(default_factory=list)

    def __repr__(self) -> str:
        means = (f"{line.name} {line.spread.mean:.2f} %" for line in self.lines if line.spread)
        return f"<Comparison: {', '.join(means) or 'no figures'}; {self.verdict} In {self.path}>"

    def _repr_html_(self) -> str:
        return report.of_comparison(facts_of(self))

    def show(self) -> None:
        """Open the page of the comparison in a browser."""
        webbrowser.open((self.path / "compare.html").absolute().as_uri())


def compare(
    model: str | nn.Module | None = None,
    loader: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    *,
    methods: Sequence[str | type[Method]] = METHODS,
    seeds: int = 3,
    recipe: str | Path | None = None,
    sets: Sequence[str] = (),
    output: str | Path = "runs",
    experiment: str | None = None,
    jobs: int = 1,
    tune: str | None = None,
    equal_compute: bool = True,
    **settings: Any,
) -> Comparison:
    """Train a network by each of `methods` and alone, with `seeds` seeds each, and say what helped.

    model, loader, validation, recipe, settings: as in `okdc.compress`. Copies of a module are trained, in this process.
    methods, seeds: what to compare, and how many runs of each, with seeds from `seed` on.
    sets: changes to the recipe, such as "train.epochs=60".
    output, experiment: the comparison is in the folder output/experiment.
    jobs: how many runs go on at a time.
    tune: "lr" finds the learning rate of each method, and of plain training, first.
    equal_compute: also train the plain network for as much compute as each method takes.

    The same call goes on where it was stopped. Figures are those of the last epoch, or, with holdout=SHARE, of the one
    that images set aside from training have picked. OkdcError says what to mend.
    """
    if tune not in (None, "lr") or (tune and loader is not None):
        raise RecipeError(
            f"tune={tune!r}: expected lr, for data that okdc reads: training images of its own are set aside for it. "
            "Leave it out, or give data=FOLDER."
        )
    own = loader is not None or isinstance(model, nn.Module)
    make = partial(_recipe, model, loader, recipe, sets, settings)
    measure = partial(_measured_own, model, loader) if own else _measured(make(arms.PLAIN))
    planned = arms.plan(methods, make, measure, equal_compute)
    plain = planned[0].recipe
    folder = Path(output) / (experiment or f"compare-{run_folder.default_name(plain).replace('-baseline-', '-')}")
    run = partial(_run_and_tell, jobs, partial(_compressed, model, loader, validation) if own else None)
    if tune:
        tried = partial(run, score=tuning.score)
        planned = tuning.tuned(planned, tuning.aside(_training_images(plain)), folder, tried)
    runs = {arm.name: {} if arm.problem else _jobs(arm, folder, seeds) for arm in planned}
    failed = run([job for of_arm in _by_seed(runs, seeds) for job in of_arm])
    found = table.lines(planned, runs, failed)
    some = next((facts for of_arm in runs.values() for job in of_arm.values() if (facts := job.facts())), {})
    shares = tasks.get(plain.network.task).is_share  # only then is there an error by the number of images
    images = (some.get("data") or {}).get("validation_images") if shares else None
    comparison = Comparison(
        folder, tasks.metric(plain), found, table.verdict(found), images, planned[0].recipe.to_dict(), warned(runs)
    )
    report.write_comparison(folder, facts_of(comparison))
    return comparison


def facts_of(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain values."""
    return {
        "title": f"{comparison.recipe['network']['model']} on {comparison.recipe['data']['data']}",
        "metric": tasks.get(comparison.recipe["network"]["task"]).metrics[comparison.metric].word,
        "images": comparison.images,
        "holdout": comparison.recipe["data"]["holdout"],
        "verdict": comparison.verdict,
        "path": comparison.path.as_posix(),
        "lines": [asdict(line) for line in comparison.lines],
        "warnings": [asdict(each) | {"who": each.who} for each in comparison.warnings],
        "command": facts.command(),
        "recipe": comparison.recipe,
    }


def _recipe(
    model: Any,
    loader: Any,
    recipe: str | Path | None,
    sets: Sequence[str],
    settings: dict[str, Any],
    method: str,
) -> Recipe:
    """The recipe of an arm: what builds branches is not for plain training, and nothing is exported."""
    places = flat_settings()
    flat = {"method": method, **settings}
    if method == arms.PLAIN:
        flat = {name: value for name, value in flat.items() if places.get(name, ("",))[0] != "cohort"}
        sets = [each for each in sets if not each.startswith(("cohort.", "method."))]
    if model is not None:
        flat["model"] = model if isinstance(model, str) else type(model).__name__
    if loader is not None:
        flat |= {"data": LOADER, "batch_size": settings.get("batch_size") or getattr(loader, "batch_size", None)}
    resolved = resolve(recipe, sets=sets, flat=flat, method_settings=known.settings, source="okdc.compare")
    metric, task = tasks.metric(resolved), tasks.get(resolved.network.task)
    if metric in task.metrics and task.metrics[metric].best == "min":
        raise RecipeError(
            f"--eval-metric {metric} is better when it is less, and okdc compare looks for more: {task.metric}."
        )
    return replace(resolved, export=NOTHING, train=replace(resolved.train, eval_metric=metric))


def _measured(plain: Recipe) -> Callable[[Recipe], Estimate]:
    """What a recipe would build around a named network for the classes of the data, which are looked at once."""
    classes = len(open_source(plain.data, plain.train.seed, tasks.get(plain.network.task)).classes)

    def measure(recipe: Recipe) -> Estimate:
        network = replace(recipe.network, pretrained=False, checkpoint=None, num_classes=classes)
        return estimate.estimate(replace(recipe, network=network))

    return measure


def _training_images(plain: Recipe) -> int:
    """How many there are to set some aside; RecipeError for a stream, of which none can be."""
    task = tasks.get(plain.network.task)
    if "holdout" in task.unsupported:
        raise RecipeError(f"--tune lr sets training images aside, which is not for --task {task.name}: give --lr.")
    source = open_source(plain.data, plain.train.seed, task)
    if hasattr(source.train, "split"):
        return len(source.train)
    raise RecipeError(
        f"--tune lr sets single training images aside, and {plain.data.data} is a stream, which is only read from "
        "front to back. Leave it out, or unpack the stream to a folder with train/ and val/."
    )


def _measured_own(model: Any, loader: Any, recipe: Recipe) -> Estimate:
    """The same around the user's own module, or for the user's own batches."""
    network = replace(recipe.network, pretrained=False, checkpoint=None)
    target = copy.deepcopy(model) if isinstance(model, nn.Module) else networks.load(network)
    size = networks.data_config(target, network)["input_size"]
    if loader is not None:
        images, _ = next(iter(loader))
        size = tuple(images.shape[1:])
    classes = networks.check_input(target, size, tasks.get(recipe.network.task)).shape[1]
    method = assemble_cohort.build_method(target, recipe, size, classes, named=False)
    return estimate.measure(method, assemble_cohort.needs(recipe)[0])


def _jobs(arm: Arm, folder: Path, seeds: int) -> dict[int, Job]:
    first = arm.recipe.train.seed
    return {
        seed: Job(folder / f"{arm.name}-s{seed}", seeded(arm.recipe, seed), arm.cost)
        for seed in range(first, first + seeds)
    }


def _by_seed(runs: dict[str, dict[int, Job]], seeds: int) -> list[list[Job]]:
    """The runs in the order in which they are done: every arm with the first seed, then with the second."""
    return [[list(jobs.values())[at] for jobs in runs.values() if jobs] for at in range(seeds)]


def _compressed(model: Any, loader: Any, validation: Any, job: Job) -> None:
    """A run in this process, of a copy of the user's own module or on the user's own batches."""
    forget()  # what was said of the comparison is not of the run
    pipeline.compress(
        copy.deepcopy(model) if isinstance(model, nn.Module) else model, loader, validation,
        recipe=job.recipe, output=job.folder.parent, experiment=job.folder.name, resume="auto",
    )  # fmt: skip


def _run_and_tell(
    at_once: int, in_process: InProcess | None, jobs: Sequence[Job], score: Score = table.score
) -> dict[Path, str]:
    """Run what is not done, and print a line for each run that ends, with the time that is left."""
    refuse_others(jobs)
    todo = [job for job in jobs if job.facts() is None]
    started, work, ended = time.monotonic(), 0.0, 0
    total = sum(_work(job) for job in todo)
    if todo:
        say(f"{len(todo)} runs, {total:,.0f} epochs' worth of plain training, into {todo[0].folder.parent}")

    def done(job: Job, reason: str | None) -> None:
        nonlocal work, ended
        work, ended = work + _work(job), ended + 1
        left = (time.monotonic() - started) / work * (total - work)
        told = f"failed: {reason}" if reason else _figure(job, score)
        say(f"{ended} of {len(todo)}  {job.folder.name}  {told}, {report.duration(left)} left")

    return run_all(jobs, at_once, done, in_process)


def _figure(job: Job, score: Score) -> str:
    metric, task = tasks.metric(job.recipe), tasks.get(job.recipe.network.task)
    value = score(job.facts() or {}, metric)
    return (
        "without a figure" if value is None else f"{task.metrics[metric].word} {value:.2f} {task.metrics[metric].unit}"
    )


def _work(job: Job) -> float:
    return job.cost * job.recipe.train.epochs
