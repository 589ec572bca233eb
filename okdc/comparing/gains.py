"""What seeds say: mean and spread of a figure, and a gain with the interval that chance leaves it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

Scores = Mapping[int, float]  # figure of each seed


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over so many seeds; one seed has no deviation."""

    mean: float
    deviation: float | None
    seeds: int

    @classmethod
    def of(cls, scores: Scores) -> Spread | None:
        """None where there are no scores."""
        values = list(scores.values())
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Gain:
    """Mean difference to a control over the seeds that both have, and its 95 % interval; one seed has none."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @classmethod
    def over(cls, scores: Scores, control: Scores) -> Gain | None:
        """Paired by seed, by Student's t (Student 1908); None where no seed is in both.

        >>> Gain.over({1: 52.0, 2: 53.0, 3: 54.0}, {1: 50.0, 2: 50.5, 3: 53.0})
        Gain(mean=1.83..., low=-0.06..., high=3.73..., seeds=3)
        """
        differences = [scores[seed] - control[seed] for seed in sorted(scores.keys() & control.keys())]
        if not differences:
            return None
        mean = statistics.fmean(differences)
        if len(differences) == 1:
            return cls(mean, None, None, 1)
        if len(set(differences)) == 1:  # no spread: scipy would warn that there is nothing to compute with
            return cls(mean, mean, mean, len(differences))
        from scipy.stats import ttest_1samp

        interval = ttest_1samp(differences, 0.0).confidence_interval(0.95)
        return cls(mean, float(interval.low), float(interval.high), len(differences))

    @property
    def is_real(self) -> bool:
        """Whether the whole interval lies above nought."""
        return self.low is not None and self.low > 0
