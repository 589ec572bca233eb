"""How long training will take on a CPU, tried on a few images before anything begins, and what makes it shorter."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from okdc import methods, networks, tasks
from okdc.data import open_source
from okdc.errors import OkdcError
from okdc.pipeline import assemble_cohort
from okdc.pipeline.opening import filled
from okdc.recipe import Recipe
from okdc.system.randomness import own_randomness
from okdc.system.saying import say
from okdc.training.machine import choose_device

LONG = 300.0  # seconds of training, from which on is said what makes it shorter
_SIDE, _EPOCHS = 128, 5  # how small images may be made, and to how few epochs a run may come down, to get there
_READ = 3  # images, for the time that reading one takes
_FORWARD = 1 / 3  # of the time of a pass forward and back


@dataclass(frozen=True)
class Forecast:
    """Seconds, about, that an epoch of the run takes and one of its control (0 where none is trained)."""

    epochs: int
    run: float
    control: float
    smaller: float | None = None  # their share where images are `_SIDE` pixels large; None where they cannot be

    @property
    def seconds(self) -> float:
        """Of all epochs of both."""
        return self.epochs * (self.run + self.control)


def forecast(recipe: Recipe, control: bool) -> Forecast | None:
    """The time that a recipe will take, its control included; None where that is not known before it begins.

    So it is on a GPU, for streams, with a teacher, and for what cannot be trained, which is told when it is tried.
    """
    if choose_device(recipe.train.device).type != "cpu" or methods.get(recipe.method["name"]).needs_teacher:
        return None
    say("Trying a step, to tell how long training takes")
    try:
        with _unsaid():
            source = open_source(recipe.data, recipe.train.seed, tasks.get(recipe.network.task))
            return _tried(recipe, source, control) if hasattr(source.train, "split") else None
    except OkdcError:
        return None


def about(seconds: float) -> str:
    """A time in words, no more exact than it is known: 40 seconds, 7 minutes, 2.5 hours."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def announce(recipe: Recipe, control: bool) -> None:
    """Say what to expect, where that is known."""
    if found := forecast(recipe, control):
        say(told(found))


def told(found: Forecast) -> str:
    """What to expect, and, where that is long, what to add to the command for less."""
    text = f"By the step that was tried, training takes about {about(found.seconds)} on this CPU"
    if found.control:
        text += f", with the control ({about(found.epochs * found.control)} of it)"
    if found.seconds <= LONG:
        return filled(f"{text}.")
    rows = [f"  {flags:46}about {about(seconds)}" for flags, seconds in _shorter(found)]
    last = "To add one: stop this with Ctrl-C, and give the new run a name, --experiment NAME"
    return "\n".join([filled(f"{text}. It takes less if you add one of these to the command:"), *rows, filled(last)])


@contextmanager
def _unsaid() -> Iterator[None]:
    """Warnings of okdc are left to the run, which gives them again."""
    log = logging.getLogger("okdc")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _shorter(found: Forecast) -> Iterator[tuple[str, float]]:
    """Flags, and the seconds that training takes with them; the last ones fit into LONG, if any do."""
    smaller, seconds, flags = found.smaller or 1.0, found.seconds, ""
    if found.control:
        yield "--no-baseline", found.epochs * found.run
    if smaller < 1:
        flags, seconds = f"--img-size {_SIDE}", seconds * smaller
        yield flags, seconds
        if seconds <= LONG:
            return
        if found.control:
            flags, seconds = f"{flags} --no-baseline", found.epochs * found.run * smaller
            yield flags, seconds
    epochs = max(_EPOCHS, int(found.epochs * LONG / seconds))
    if seconds > LONG and epochs < found.epochs:
        yield f"{flags} --epochs {epochs}".strip(), seconds * epochs / found.epochs


def _tried(recipe: Recipe, source: Any, control: bool) -> Forecast:
    """What a batch of noise takes in the recipe's network and method, for as many images as there are."""
    with own_randomness():
        network = replace(recipe.network, pretrained=False)  # as fast as with any weights; a checkpoint has to fit
        target = networks.load(network, len(source.classes))
        size = networks.data_config(target, network)["input_size"]
        method = assemble_cohort.build_method(
            target, replace(recipe, network=network), size, len(source.classes), named=True,
            train_labels=source.train.labels,
        )  # fmt: skip
        alone, together = methods.pace(method, assemble_cohort.needs(recipe)[0])
        method.strip()
        smaller = _smaller(target, size, recipe)
    read = _reading(source.train)
    training, validation = len(source.train), len(source.validation or ())
    run, plain = (
        training * (seconds + read) + validation * (seconds * _FORWARD + read) for seconds in (together, alone)
    )
    return Forecast(recipe.train.epochs, run, plain if control else 0.0, smaller)


def _smaller(target: torch.nn.Module, size: tuple[int, int, int], recipe: Recipe) -> float | None:
    """The share of time that images of `_SIDE` pixels take; None where they are no smaller, or the network cannot."""
    if recipe.network.img_size or min(size[1:]) <= _SIDE:
        return None
    try:
        networks.check_input(target, (size[0], _SIDE, _SIDE), tasks.get(recipe.network.task))
    except OkdcError:
        return None
    return _SIDE**2 / (size[1] * size[2])


def _reading(images: Any) -> float:
    """Seconds that reading an image takes, shared by all cores; 0 where the first cannot be read."""
    began = time.process_time()
    try:
        for position in range(min(_READ, len(images))):
            images[position][0].convert("RGB")
    except Exception:  # whatever reading raises: it is told where images are read to be trained on
        return 0.0
    return (time.process_time() - began) / min(_READ, len(images)) / (os.cpu_count() or 1)
