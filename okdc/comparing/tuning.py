"""Each arm at its own best learning rate, chosen on training images that are set aside, never on validation images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from okdc import tasks
from okdc.comparing.arms import PLAIN, Arm
from okdc.comparing.running import Job
from okdc.errors import TrainingError

FOLDER = "tuning"
STEP = 3.0  # from one learning rate of the grid to the next
FURTHER = 2  # how often the grid grows where its best rate is the smallest or the largest
ASIDE, ENOUGH = 0.1, 200  # the rates are judged on that share of the training images, or on so many, at most on half


def aside(images: int) -> float:
    """The share of so many training images to judge learning rates on.

    >>> aside(5000), aside(1000), aside(200)
    (0.1, 0.2, 0.5)
    """
    return max(ASIDE, min(0.5, ENOUGH / images))


Run = Callable[[Sequence[Job]], object]
Judged = tuple[float, float]  # the score, and the loss with a minus, of the images set aside: higher is better
Rates = dict[float, Judged]
FAILED: Judged = (-math.inf, -math.inf)


def tuned(arms: Sequence[Arm], share: float, folder: Path, run: Run) -> list[Arm]:
    """The arms, each at the best rate of a grid around its own; longer plain training takes the rate of plain training.

    The grid is a third, once and three times the rate; while the best one is at its end, it grows there. They are
    judged on that `share` of the training images, with the recipe's own seed and all epochs. TrainingError where no
    rate of an arm trains.
    """
    own = [arm for arm in arms if not arm.problem and (arm.name == PLAIN or not arm.is_plain)]
    rates: dict[str, Rates] = {arm.name: {} for arm in own}
    for _ in range(1 + FURTHER):
        jobs = {(arm.name, rate): _job(arm, rate, share, folder) for arm in own for rate in _next(arm, rates[arm.name])}
        if not jobs:
            break
        run(list(jobs.values()))
        for (name, rate), job in jobs.items():
            rates[name][rate] = _judged(job)
    best = {arm.name: _chosen(arm, rates[arm.name]) for arm in own}
    return [_at(arm, best[PLAIN if arm.is_plain else arm.name]) if not arm.problem else arm for arm in arms]


def _next(arm: Arm, found: Rates) -> list[float]:
    """The rates to try next: the grid, or one beyond its end where the best one is there."""
    if not found:
        return [_rounded(arm.recipe.train.peak_lr * STEP**power) for power in (-1, 0, 1)]
    best, rates = _best(arm, found), sorted(found)
    if best == rates[0] or found[best] == FAILED:
        return [_rounded(rates[0] / STEP)]
    return [_rounded(best * STEP)] if best == rates[-1] else []


def _best(arm: Arm, found: Rates) -> float:
    """The rate with the best score; of equals the one with the least loss, and then the nearest to the arm's own.

    So few images are set aside that scores are often equal where the losses are far apart.
    """
    own = arm.recipe.train.peak_lr
    return max(found, key=lambda rate: (*found[rate], -abs(math.log(rate / own))))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def _at(arm: Arm, rate: float) -> Arm:
    return replace(arm, recipe=replace(arm.recipe, train=replace(arm.recipe.train, lr=rate)))


def _job(arm: Arm, rate: float, share: float, folder: Path) -> Job:
    recipe = _at(arm, rate).recipe
    recipe = replace(recipe, data=replace(recipe.data, holdout=recipe.data.holdout or share))
    return Job(folder / FOLDER / f"{arm.name}-lr{rate:g}", recipe, arm.cost)


def score(facts: dict[str, Any], metric: str) -> float | None:
    """What the images set aside say of a run's last epoch; None where there is none."""
    history = facts.get("history") or [{}]
    return history[-1].get(f"eval_{metric}")


def _judged(job: Job) -> Judged:
    facts = job.facts() or {}
    value = score(facts, tasks.metric(job.recipe))
    if value is None:
        return FAILED
    loss = facts["history"][-1].get("eval_loss")
    return value, -loss if loss is not None and math.isfinite(loss) else -math.inf


def _chosen(arm: Arm, found: Rates) -> float:
    best = _best(arm, found)
    if found[best] == FAILED:
        tried = ", ".join(f"{each:g}" for each in sorted(found))
        raise TrainingError(f"{arm.name} trains at none of the learning rates {tried}. Give another --lr.")
    return best
