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
from okdc.data.transforms import MODES, image_transform, preprocessing
from okdc.errors import OkdcError
from okdc.pipeline import assemble, assemble_cohort, run_folder
from okdc.pipeline.opening import filled
from okdc.recipe import Recipe
from okdc.system import saying
from okdc.system.busy import Others
from okdc.system.randomness import own_randomness
from okdc.system.saying import say
from okdc.training.machine import Machine, choose_device

LONG = 300.0  # seconds of training, from which on is said what makes it shorter
_SIDE, _EPOCHS = 128, 5  # how small images may be made, and to how few epochs a run may come down, to get there
_READ = 3  # images, for the time that reading one takes
_FORWARD = 1 / 3  # of the time of a pass forward and back
_WRITING = 30.0  # seconds for ONNX: torch has to trace the network, and every file is timed
_LOOKED = 3  # how often each validation image is looked at again: in torch, in ONNX and by predict.py
_LISTENED = 0.3  # seconds, to see what others use
_FREE = 0.8  # share of the cores that torch wants, below which others disturb it


@dataclass(frozen=True)
class Forecast:
    """Seconds, about, that an epoch of the run takes and one of its control (0 where none is trained)."""

    epochs: int
    run: float
    control: float
    smaller: float | None = None  # their share where images are `_SIDE` pixels large; None where they cannot be
    after: float = 0.0  # seconds for export and verification

    @property
    def seconds(self) -> float:
        """Of all epochs of both."""
        return self.epochs * (self.run + self.control)


def forecast(recipe: Recipe, control: bool) -> Forecast | None:
    """The time that a recipe will take, its control included; None where that is not known before it begins.

    So it is on a GPU, for streams, key points and what `_is_alike` leaves out, and for what cannot be trained, which is
    told when it is; also where other programs disturb what is timed, which is said.
    """
    if not _is_alike(recipe):
        return None
    if used := disturbing():
        shorter = "Fewer --epochs, a smaller --img-size and --no-baseline make"
        say(
            filled(
                f"Other programs use {used:.1f} of the {os.cpu_count()} cores of this machine, so nobody can tell "
                "how long training takes. The lines of the first epochs show it. "
                f"{shorter if control else 'Fewer --epochs and a smaller --img-size make'} it shorter."
            )
        )
        return None
    say("Trying a few steps, to tell how long training takes")
    try:
        with _unsaid():
            source = open_source(recipe.data, recipe.train.seed, tasks.get(recipe.network.task))
            return _tried(recipe, source, control) if hasattr(source.train, "split") else None
    except Exception:  # whatever it is, the run raises it again
        return None


def _is_alike(recipe: Recipe) -> bool:
    """Whether steps on trial take as long as those of the run, and building all of it twice does no harm.

    A teacher takes long to load, a step to compile; a second-order method trains within a step; the user's own code may
    do more than build.
    """
    kind, settings = methods.get(recipe.method["name"]), recipe.train
    odd = settings.torchcompile or kind.needs_teacher or kind.second_order
    return choose_device(settings.device).type == "cpu" and not (odd or run_folder.trusted(recipe))


def disturbing() -> float:
    """Cores that other programs use, where they leave too few for a step to be timed; 0 where they do not."""
    with Others() as others:
        time.sleep(_LISTENED)
    cores = os.cpu_count() or 1
    return others.cores if cores - others.cores < _FREE * min(torch.get_num_threads(), cores) else 0.0


def about(seconds: float) -> str:
    """A time in words, no more exact than it is known: 40 seconds, 7 minutes, 2.5 hours."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def announce(recipe: Recipe, control: bool) -> None:
    """Say what to expect, where that is known and somebody listens."""
    if saying.quiet:
        return
    if found := forecast(recipe, control):
        say(told(found))


def told(found: Forecast) -> str:
    """What to expect, and, where that is long, what to add to the command for less."""
    text = f"By the steps that were tried, training takes about {about(found.seconds)} on this CPU"
    text += f", with the baseline ({about(found.epochs * found.control)} of it)" if found.control else ""
    text += f". Export and verification take about {about(found.after)} more" if found.after else ""
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
        with assemble.at_home(target, recipe.train):
            method = assemble_cohort.build_method(
                target, replace(recipe, network=network), size, len(source.classes), named=True,
                train_labels=source.train.labels,
            )  # fmt: skip
            with Machine.of(recipe.train).autocast():
                alone, together = methods.pace(method, assemble_cohort.needs(recipe)[0], recipe.train.batch_size)
            method.strip()
        smaller = _smaller(target, size, recipe)
        read = _reading(source.train, recipe, networks.data_config(target, network))
    training, validation = len(source.train), len(source.validation or ())
    run, plain = (
        training * (seconds + read) + validation * (seconds * _FORWARD + read) for seconds in (together, alone)
    )
    after = _WRITING + _LOOKED * validation * (alone * _FORWARD + read) if recipe.export.onnx else 0.0
    return Forecast(recipe.train.epochs, run, plain if control else 0.0, smaller, after)


def _smaller(target: torch.nn.Module, size: tuple[int, int, int], recipe: Recipe) -> float | None:
    """The share of time that images of `_SIDE` pixels take; None where they are no smaller, or the network cannot."""
    if recipe.network.img_size or min(size[1:]) <= _SIDE:
        return None
    try:
        networks.check_input(target, (size[0], _SIDE, _SIDE), tasks.get(recipe.network.task))
    except OkdcError:
        return None
    return _SIDE**2 / (size[1] * size[2])


def _reading(images: Any, recipe: Recipe, config: dict[str, Any]) -> float:
    """Seconds that reading and augmenting an image take, shared by all cores; 0 where the first cannot be read."""
    config = preprocessing(recipe.data, config)
    try:
        transform, mode = image_transform(recipe.data, config, training=True), MODES[config["input_size"][0]]
        began = time.process_time()
        for position in range(min(_READ, len(images))):
            transform(images[position][0].convert(mode))
    except Exception:  # whatever reading raises: it is told where images are read to be trained on
        return 0.0
    return (time.process_time() - began) / min(_READ, len(images)) / (os.cpu_count() or 1)
