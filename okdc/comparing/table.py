"""What came of a comparison: one line for each arm, best first, and in a sentence what to use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from okdc import tasks
from okdc.comparing.arms import PLAIN, Arm
from okdc.comparing.gains import Gain, Spread
from okdc.comparing.running import Job


@dataclass(frozen=True)
class Line:
    """One arm: the student's figure (per cent) of each seed, its gains over plain training, and what it takes.

    `gain` is over the same number of epochs, `equal` over as much compute, both in points. `compute` is what all of its
    training takes, in FLOPs, as a multiple of the plain one's; `seconds` are the mean of its runs. `curve` is the
    figure by epoch, the mean of the seeds.
    """

    name: str
    epochs: int
    lr: float
    compute: float
    scores: dict[int, float]
    spread: Spread | None
    gain: Gain | None = None
    equal: Gain | None = None
    seconds: float | None = None
    curve: list[float] = field(default_factory=list)
    problem: str | None = None


def lines(arms: Sequence[Arm], jobs: dict[str, dict[int, Job]], failed: dict[Any, str]) -> list[Line]:
    """The arms with what their runs say, the best first, those without a figure last."""
    found = {arm.name: {seed: facts for seed, job in jobs[arm.name].items() if (facts := job.facts())} for arm in arms}
    scores = {arm.name: _scores(found[arm.name], arm) for arm in arms}
    epochs = arms[0].recipe.train.epochs
    made = [_line(arm, epochs, found[arm.name], scores, jobs[arm.name], failed) for arm in arms]
    return sorted(made, key=lambda line: -(line.spread.mean if line.spread else -math.inf))


def _scores(runs: dict[int, dict[str, Any]], arm: Arm) -> dict[int, float]:
    values = {seed: score(facts, tasks.metric(arm.recipe)) for seed, facts in runs.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def score(facts: dict[str, Any], metric: str) -> float | None:
    """The figure of a run: of its last epoch, or of the one that images set aside from training have picked."""
    if facts["metrics"].get("holdout") is not None:
        return facts["metrics"].get(metric)
    return facts["history"][-1].get(f"eval_{metric}")


def _line(
    arm: Arm,
    epochs: int,
    runs: dict[int, dict[str, Any]],
    scores: dict[str, dict[int, float]],
    jobs: dict[int, Job],
    failed: dict[Any, str],
) -> Line:
    own, settings = scores[arm.name], arm.recipe.train
    seconds = [facts["metrics"]["seconds"] for facts in runs.values()]
    reasons = dict.fromkeys(failed[job.folder] for job in jobs.values() if job.folder in failed)
    return Line(
        name=arm.name,
        epochs=settings.epochs,
        lr=settings.peak_lr,
        compute=arm.cost * settings.epochs / epochs,
        scores=own,
        spread=Spread.of(own),
        gain=Gain.over(own, scores[PLAIN]) if arm.name != PLAIN else None,
        equal=Gain.over(own, scores[arm.control]) if arm.control else None,
        seconds=sum(seconds) / len(seconds) if seconds else None,
        curve=_curve(list(runs.values()), f"eval_{tasks.metric(arm.recipe)}"),
        problem=arm.problem or " ".join(reasons) or None,
    )


def _curve(runs: list[dict[str, Any]], column: str) -> list[float]:
    histories = [[row.get(column) for row in facts["history"]] for facts in runs]
    return [sum(values) / len(values) for values in zip(*histories) if None not in values]


def verdict(found: Sequence[Line]) -> str:
    """What to use here, in one sentence, or that nothing beat plain training by more than chance."""
    tried = [line for line in found if line.spread and line.gain and not line.name.startswith(PLAIN)]
    if not tried:
        return "No method was trained to its end, so there is nothing to say yet."
    many = f" It is the best of {len(tried)} methods, which flatters it." if len(tried) > 2 else ""
    for line in tried:
        if _real(line.gain) and _real(line.equal):
            return (
                f"Use `{line.name}` here: {_told(line.gain)} over plain training, and {_told(line.equal)} over plain "
                f"training with as much compute.{many}"
            )
    for line in tried:
        if _real(line.gain) and line.equal:
            return (
                f"`{line.name}` beats plain training for as many epochs ({_told(line.gain)}), but plain training with "
                f"as much compute not by more than chance ({_told(line.equal)}): train the plain network longer "
                "instead."
            )
        if _real(line.gain):
            return f"Use `{line.name}` here: {_told(line.gain)} over plain training for as many epochs.{many}"
    best = tried[0]
    if best.gain and best.gain.seeds == 1 and best.gain.mean <= 0:
        return (
            "No method was ahead of plain training, but one seed cannot tell that from chance: give --seeds 3 or more."
        )
    if best.gain and best.gain.seeds == 1:
        return (
            f"The best method is `{best.name}`, {_told(best.gain)} over plain training, but one seed cannot tell a "
            "gain from chance: give --seeds 3 or more."
        )
    return f"Nothing beat plain training by more than chance; the best method is `{best.name}`, {_told(best.gain)}."


def _real(gain: Gain | None) -> bool:
    return gain is not None and gain.is_real


def _told(gain: Gain | None) -> str:
    if gain is None:
        return "with nothing to compare"
    interval = "" if gain.low is None else f" (95 % interval {gain.low:+.2f} to {gain.high:+.2f}, {gain.seeds} seeds)"
    return f"{round(gain.mean, 2) + 0.0:+.2f} points{interval}"
