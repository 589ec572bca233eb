"""Validation images that tell something of a student: its surest answers, right and wrong, and what the control said.

One pass over the images, of which only those that are shown are kept.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from okdc import report
from okdc.errors import OkdcError
from okdc.pipeline import run_folder
from okdc.system.saying import say
from okdc.system.wording import one_line
from okdc.tasks.pose import Pose
from okdc.training import checkpoint
from okdc.training.machine import Machine

if TYPE_CHECKING:
    from okdc.pipeline.result import Result

EACH = 6  # images of a group
ALIKE = 2  # of the surest right answers, at most so many have one label: else an easy class could have all


T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """An image of a group with its label, and what the student and the control gave for it."""

    weight: float
    image: Tensor
    label: Tensor
    out: Tensor
    control: Tensor | None
    right: bool


@torch.no_grad()
def of(result: Result) -> dict[str, Any] | None:
    """The examples of a run as plain values; None without validation images, or for a task that calls none right.

    The control is the one that `run_folder.find_baseline` finds, if it has learned the same classes.
    """
    data, task = result.data, result.task
    if data.validation is None:
        return None
    machine, control = Machine.of(result.recipe.train), _control(result)
    networks = [each.eval().to(machine.device) for each in (copy.deepcopy(result.student), control) if each is not None]
    groups: dict[str, list[Seen]] = {}
    for images, labels in data.validation:
        moved, labels = machine.move(images, labels)
        with machine.autocast():
            outs = [task.result(network(moved)) for network in networks]
        verdict = task.notable(outs[0], labels)
        if verdict is None:
            return None
        right, weight = verdict
        theirs = task.notable(outs[1], labels) if control is not None else None
        for name, wanted in _groups(right, None if theirs is None else theirs[0]):
            alike = ALIKE if name == "right" else EACH
            groups[name] = _kept(groups.get(name, []), wanted, weight, right, moved, labels, outs, alike)
    return _facts(groups, result)


@torch.no_grad()
def pictured(result: Result) -> list[dict[str, Any]] | None:
    """Key points on some validation images, as plain values; None for another task, or without such images."""
    data, task = result.data, result.task
    if data.validation is None or not isinstance(task, Pose):
        return None
    images, labels = next(iter(data.validation))
    places = torch.linspace(0, len(images) - 1, min(EACH, len(images))).long()  # neighbouring frames are alike
    machine, network = Machine.of(result.recipe.train), copy.deepcopy(result.student).eval()
    moved, _ = machine.move(images[places], labels[places])
    maps = task.result(network.to(machine.device)(moved)).float().cpu()
    edges = task.maps.skeleton.edges
    return report.pictured(images[places].cpu(), task.maps.decode(maps), labels[places], edges, data.preprocess)


def _groups(right: Tensor, theirs: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Which images (B,) belong to which group, by whether the student and the control are right."""
    yield from (("right", right), ("wrong", ~right))
    if theirs is not None:
        yield from (("gained", right & ~theirs), ("lost", ~right & theirs))


def _kept(
    kept: list[Seen],
    wanted: Tensor,
    weight: Tensor,
    right: Tensor,
    images: Tensor,
    labels: Tensor,
    outs: list[Tensor],
    alike: int,
) -> list[Seen]:
    """The most telling images of a group, `alike` of a label at most, with those of a further batch; of equals the
    first."""
    wanted = wanted & weight.isfinite()
    if len(kept) == EACH:
        wanted &= weight > kept[-1].weight
    places = wanted.nonzero()[:, 0]
    surest = places[weight[places].argsort(descending=True, stable=True)].tolist()
    for i in _spread(surest, lambda i: labels[i], alike):
        given = [out[i].float().cpu() for out in outs]
        image, label = images[i].float().cpu(), labels[i].cpu()
        seen = Seen(float(weight[i]), image.clone(), label.clone(), given[0], (*given, None)[1], bool(right[i]))
        kept = [*kept, seen]
    return _spread(sorted(kept, key=lambda each: -each.weight), lambda each: each.label, alike)


def _spread(ranked: Sequence[T], label: Callable[[T], Tensor], alike: int) -> list[T]:
    """The first EACH, of which `alike` at most have the same label."""
    chosen: list[T] = []
    counts = Counter[str]()
    for each in ranked:
        counts[key := str(label(each).tolist())] += 1
        if counts[key] <= alike and len(chosen) < EACH:
            chosen.append(each)
    return chosen


def _control(result: Result) -> nn.Module | None:
    """The network of the control, where there is one that has learned the same classes."""
    found = run_folder.find_baseline(result.path, result.recipe)
    folder = result.path.parent / found["name"] if found else None
    if folder is None or not (folder / checkpoint.BEST).is_file():
        return None
    if (run_folder.read_student(folder) or {}).get("classes") != list(result.data.classes):
        return None
    network = copy.deepcopy(result.student)
    try:
        network.load_state_dict(checkpoint.student_weights(checkpoint.load(folder / checkpoint.BEST)))
    except (RuntimeError, OkdcError) as error:  # a module of the same name that is another, or a damaged file
        say(f"The report shows no examples of the baseline, whose weights in {folder} do not fit: {one_line(error)}")
        return None
    return network


def _facts(groups: dict[str, list[Seen]], result: Result) -> dict[str, Any]:
    preprocess, task, names = result.data.preprocess, result.task, result.data.classes
    rows = {
        name: [
            {
                "picture": report.picture(report.unnormalised(seen.image, preprocess)),
                "truth": task.truth(seen.label, names), "said": task.said(seen.out, names), "right": seen.right,
                "control": None if seen.control is None else task.said(seen.control, names),
            }
            for seen in group
        ]
        for name, group in groups.items()
    }  # fmt: skip
    return {"groups": rows, "normalised": "mean" not in preprocess, "channels": preprocess["input_size"][0]}
