"""What a run says before its first epoch: what is trained, on what, how long, what it costs, and where it goes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from okdc import methods
from okdc.data import Data
from okdc.methods import Method
from okdc.pipeline import assemble_cohort
from okdc.recipe import Recipe
from okdc.tasks.task import Task
from okdc.training.machine import choose_device

_WIDTH, _INDENT = 79, 10
_LOOKED_AT = 8  # images, for their size
_STEEP = 5.0  # times plain training's gradient, of which is said how to train with it; AHBF has 3 to 14
_BY_SIZE = ("sgd", "momentum", "nesterov")  # optimizers whose step is as large as the gradient
_SMALL = 2.5  # how many times larger the input is than images of which that is said


def opening(method: Method, data: Data, recipe: Recipe, folder: Path) -> str:
    """The screen before the first epoch, at most 79 columns wide."""
    costs, settings, (height, width) = method.cohort.costs, recipe.train, data.preprocess["input_size"][1:]
    steps = math.ceil(len(data.train) / settings.grad_accum_steps)
    rows = {
        "network": f"{recipe.network.model}, {costs[0].params:,} parameters, images of {width} x {height} pixels",
        "data": f"{data.name}: {_count(data.sizes[0], 'training image')} and "
        f"{_count(data.sizes[1], 'validation image')}, {_outputs(method.task, len(data.classes))}",
        "method": f"{recipe.method['name']}, {_count(len(costs), 'member')}. {_first_line(recipe.method['name'])}",
        "training": f"{_count(settings.epochs, 'epoch')} of {_count(steps, 'step')}, {settings.images_per_step:,} "
        f"images per step, learning rate {settings.peak_lr:.3g}, "
        f"{_clipped(method, settings.clip_grad)}{_device(recipe)}",
        "cost": _cost(method, recipe),
        "folder": str(folder),
    }
    return "\n".join(filled(f"{name:{_INDENT}}{told}", _INDENT) for name, told in rows.items())


def filled(text: str, indent: int = 0) -> str:
    """A paragraph in which no word is broken, lines but the first indented."""
    return textwrap.fill(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def steep(method: Method, recipe: Recipe) -> str | None:
    """What to type where the first steps would be much larger than plain training's; None where they would not."""
    settings = recipe.train
    if len(method.cohort) == 1 or settings.opt not in _BY_SIZE or method.clipped_to(settings.clip_grad):
        return None
    found = methods.first_gradients(method, assemble_cohort.needs(recipe)[0])
    if found.ratio < _STEEP:
        return None
    return filled(
        f"At the start, the losses of `{recipe.method['name']}` give the network a gradient {found.ratio:.0f} times as "
        f"large as plain training does. If the loss does not fall, type a lower --lr than {settings.peak_lr:.3g}, or "
        f"--clip-grad {found.plain:.2g}, which is as large as the gradient of plain training."
    )


def small_images(images: Any, input_size: Sequence[int], model: str) -> str | None:
    """What to type where images, (PIL image, class) by position, are much smaller than the input; None where not."""
    count = len(images) if hasattr(images, "split") else 0  # a stream is only read from front to back
    sides = [side for each in range(min(_LOOKED_AT, count)) if (side := _side(images, each))]
    if not sides or max(sides) * _SMALL > input_size[1]:
        return None
    side = 32 * math.ceil(max(sides) / 32)
    return (
        f"the images have up to {max(sides)} pixels a side, and {model} is given {input_size[1]}: they are enlarged, "
        f"which takes much time for little. --small-input --img-size {side} trains it at about their own size"
    )


def _side(images: Any, position: int) -> int | None:
    """The longer side of an image, pixels; None for one that cannot be read, which is told elsewhere."""
    try:
        return max(images[position][0].size)
    except Exception:  # whatever reading raises
        return None


def _first_line(name: str) -> str:
    return methods.card(name).splitlines()[0]


def _cost(method: Method, recipe: Recipe) -> str:
    """The FLOPs of a step beside the network's own, and the memory that does not depend on the images, about."""
    costs = method.cohort.costs
    learning = sum(p.numel() for p in method.parameters() if p.requires_grad)
    fixed = sum(p.numel() for p in method.parameters())
    states = 1 if recipe.train.opt in ("sgd", "momentum", "nesterov") else 2
    size = 4 * (fixed + (1 + states) * learning)
    memory = f"{size / 2**30:.2g} GiB" if size >= 2**30 else f"{max(1, size / 2**20):.0f} MiB"
    memory += " of weights, gradients and optimizer; images come on top"
    if len(costs) == 1:
        return memory
    times = sum(each.flops for each in costs) / costs[0].flops
    return f"a step takes {times:.2g} times the FLOPs of the network alone, which ships alone; {memory}"


def _clipped(method: Method, asked: float | None) -> str:
    limit = method.clipped_to(asked)
    return f"gradients clipped to {limit:g}, " if limit else ""


def _device(recipe: Recipe) -> str:
    device, settings = choose_device(recipe.train.device), recipe.train
    count = settings.devices * settings.nodes
    return f"on {device}" if count == 1 else f"{count} processes on {device.type}"


def _outputs(task: Task, number: int) -> str:
    return f"{number:,} {task.nouns[number != 1]}"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"
