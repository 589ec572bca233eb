"""What seeds say: checked against the textbook formula, and the sentences that follow from it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from okdc.comparing.gains import Gain, Spread
from okdc.comparing.table import Line, verdict

T_2 = 4.302653  # of Student's t with two degrees of freedom, two-sided 95 %


def test_a_gain_is_paired_by_seed() -> None:
    gain = Gain.over({1: 52.0, 2: 53.0, 3: 54.5, 9: 90.0}, {3: 53.0, 2: 50.5, 1: 50.0, 8: 0.0})
    mean, deviation = 2.0, 0.5  # of 2.0, 2.5, 1.5
    assert gain is not None and gain.seeds == 3 and gain.mean == pytest.approx(mean)
    half = T_2 * deviation / math.sqrt(3)
    assert (gain.low, gain.high) == (pytest.approx(mean - half, abs=1e-5), pytest.approx(mean + half, abs=1e-5))
    assert gain.is_real and not Gain.over({1: 5.0, 2: 1.0}, {1: 1.0, 2: 2.0}).is_real  # type: ignore[union-attr]


def test_one_seed_has_no_interval_and_equal_differences_are_their_own() -> None:
    assert Gain.over({1: 52.0}, {1: 50.0}) == Gain(2.0, None, None, 1)
    assert Gain.over({1: 52.0}, {2: 50.0}) is None
    assert Gain.over({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}) == Gain(1.0, 1.0, 1.0, 2)
    assert Spread.of({}) is None and Spread.of({1: 3.0}) == Spread(3.0, None, 1)
    assert Spread.of({1: 1.0, 2: 3.0}) == Spread(2.0, pytest.approx(math.sqrt(2)), 2)


def line(name: str, mean: float, gain: tuple[float, ...] | None = None, equal: tuple[float, ...] | None = None) -> Line:
    def of(values: Any) -> Gain | None:
        return Gain(*values, 3) if values else None

    return Line(name, 20, 0.1, 2.0, {1: mean}, Spread(mean, 0.5, 3), of(gain), of(equal))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([line("one", 60, (3, 1, 5), (2, 0.5, 3)), line("baseline", 57)], r"Use `one` here: \+3\.00 points \(95 %"),
        (
            [line("dml", 61, (4, -1, 9), (3, -1, 7)), line("one", 60, (3, 1, 5), (2, 0.5, 3)), line("baseline", 57)],
            "Use `one` here",  # the better mean is not beyond chance
        ),
        (
            [line("baseline-40-epochs", 61), line("one", 60, (3, 1, 5), (-1, -2, 0)), line("baseline", 57)],
            r"`one` beats plain training for as many epochs .* train the plain network longer instead",
        ),
        ([line("one", 60, (3, 1, 5)), line("baseline", 57)], "for as many epochs"),
        ([line("baseline", 60), line("one", 59, (-1, -3, 1), (-1, -3, 1))], r"Nothing beat plain .* `one`, -1\.00"),
        ([line("one", 60, (3, None, None), None), line("baseline", 57)], "Nothing beat plain"),
        ([line("baseline", 57)], "No method was trained"),
    ],
)  # fmt: skip
def test_the_last_line_says_what_to_use(lines: list[Line], told: str) -> None:
    import re

    assert re.search(told, verdict(lines))


def test_one_seed_tells_no_gain_from_chance() -> None:
    one = Line("one", 20, 0.1, 2.0, {1: 60}, Spread(60, None, 1), Gain(3, None, None, 1), None)
    assert "give --seeds 3 or more" in verdict([one, line("baseline", 57)])
