"""The examples of the losses say what they give."""

from __future__ import annotations

import doctest
import inspect

import pytest

from okdc import losses

FUNCTIONS = inspect.getmembers(losses, lambda each: inspect.isfunction(each) and each.__module__ == losses.__name__)
NAMES = [name for name, _ in FUNCTIONS if not name.startswith("_")]


def test_every_public_loss_is_listed() -> None:
    assert len(NAMES) >= 9 and {"cross_entropy", "kl", "nce", "rampup"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_loss_runs(name: str) -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(losses, name), name, globs=vars(losses).copy())
    assert found.examples, "give it an example"
    said: list[str] = []
    assert doctest.DocTestRunner().run(found, out=said.append).failed == 0, "".join(said)
