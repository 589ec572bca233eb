"""What the runs of a comparison warned of: each warning once, with the arms and seeds that it concerns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from okdc.comparing.running import Job

_FIGURE = re.compile(r"(?<!\S)\d[\d.,]*(?!\S)")  # a number that stands alone, and may differ from seed to seed


@dataclass(frozen=True)
class Warned:
    """A warning, and the seeds of the runs that gave it by the name of their arm; figures are those of the first."""

    text: str
    runs: dict[str, list[int]]

    @property
    def who(self) -> str:
        """The runs in words: baseline and one, seeds 42 to 44; dml, seed 43."""
        arms: dict[str, list[str]] = {}
        for arm, seeds in self.runs.items():
            arms.setdefault(_seeds(seeds), []).append(arm)
        return "; ".join(f"{_and(names)}, {seeds}" for seeds, names in arms.items())


def warned(jobs: dict[str, dict[int, Job]]) -> list[Warned]:
    """The warnings of all runs, by arm and seed; those that differ in figures alone are one."""
    found: dict[str, Warned] = {}
    texts: dict[str, set[str]] = {}
    for arm, by_seed in jobs.items():
        for seed, job in by_seed.items():
            for text in job.warnings():
                alike = _FIGURE.sub("0", text)
                texts.setdefault(alike, set()).add(text)
                seeds = found.setdefault(alike, Warned(text, {})).runs.setdefault(arm, [])
                seeds += [seed] if seed not in seeds else []
    return [each if len(texts[alike]) == 1 else _of_the_first(each) for alike, each in found.items()]


def _of_the_first(each: Warned) -> Warned:
    arm, seeds = next(iter(each.runs.items()))
    return Warned(f"{each.text} (With the figures of {arm}, seed {seeds[0]}.)", each.runs)


def _seeds(seeds: list[int]) -> str:
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seed{'s' * (len(seeds) > 1)} {_and(map(str, seeds))}"


def _and(words: Iterable[str]) -> str:
    """
    >>> _and(["a", "b", "c"])
    'a, b and c'
    """
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
