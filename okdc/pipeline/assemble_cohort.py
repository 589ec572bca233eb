"""The cohort that the method wants, built around the target: settings checked, peers built, branches proved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from okdc import methods, networks, tasks
from okdc.cohort import Found, Known, has_versions
from okdc.data import Data
from okdc.errors import RecipeError, RunError
from okdc.methods import Method
from okdc.needs import Needs
from okdc.pipeline import teachers
from okdc.ranks import first
from okdc.recipe import CohortSettings, NetworkSettings, Recipe
from okdc.tasks.task import Task
from okdc.training import checkpoint
from okdc.training.machine import choose_device

_OF_BRANCHES = ("members", "peers", "cut", "private_stages", "extra_blocks", "trunk_gradient")  # nothing for one alone


def task_of(recipe: Recipe, input_size: tuple[int, int, int], noted: Mapping[str, Any] | None = None) -> Task:
    """What the recipe's networks are for, with what its data tell (`Data.noted`) and the size of their images."""
    told = {**(noted or {}), "input_size": input_size, "encoding": recipe.network.encoding}
    return tasks.get(recipe.network.task, told)


def load_teacher(recipe: Recipe, data: Data, proved: bool = False) -> nn.Module | None:
    """The trained network that the recipe names, None where there is none; it is tried on the data unless `proved`."""
    name, task = recipe.cohort.teacher, task_of(recipe, data.preprocess["input_size"], data.noted)
    if name is None:
        return None
    network = teachers.load(name, data.preprocess["input_size"], len(data.classes), recipe.network.model, task)
    teachers.align(network, name, data.classes, data.preprocess["input_size"])
    if not proved:
        teachers.check_accuracy(network, name, data, choose_device(recipe.train.device), recipe.train.timeout, task)
    return network


def build_method(
    target: nn.Module,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    classes: int,
    named: bool,
    teacher: nn.Module | None = None,
    train_labels: Tensor | None = None,
    noted: Mapping[str, Any] | None = None,
    known: Known | None = None,
) -> Method:
    """The cohort that the method wants, built around the target and proved, with the method that owns it.

    `input_size` (C, H, W) and `classes` are the data's. `named`: the recipe's name makes such a network, so that
    branches may be newly made rather than redrawn copies. `teacher`: for a method that needs one. `train_labels` (N,)
    are those of the training images, where they are known; `noted` is what the data tell the task. `known` may know
    what was proved of an equal cohort, where all of the target's code has a version.
    """
    name, task = recipe.method["name"], task_of(recipe, input_size, noted)
    methods.refuse_task(name, task)
    if task.distances:
        task.compare_by(recipe.train.distance, recipe.train.distance_kwargs)
    cohort, network = recipe.cohort, recipe.network
    first = next(target.parameters())
    example = torch.randn(2, *input_size, device=first.device, dtype=first.dtype)
    _refuse_contradictions(cohort, methods.get(name))
    maker = replace(network, pretrained=False, checkpoint=None)
    # What is frozen keeps the target's weights, in branches too: they are copies then, redrawn where they learn.
    remade = named and network.model in networks.names() and not recipe.train.freeze
    method = methods.build(
        target, example, name, members=cohort.members, extra_blocks=cohort.extra_blocks,
        private_stages=cohort.private_stages, cut=cohort.cut, share=cohort.share,
        trunk_gradient=cohort.trunk_gradient,
        peers=[_peer(peer, network, input_size, classes, task).to(first.device) for peer in cohort.peers],
        teacher=None if teacher is None else teacher.to(first.device), train_labels=train_labels,
        pretrained=network.pretrained or network.checkpoint is not None,
        fresh=(lambda: networks.load(maker, classes)) if remade else None, task=task,
        soft_labels=bool(recipe.data.mixup or recipe.data.cutmix or recipe.data.smoothing),
        known=known if named and has_versions(target) else None, **_settings(recipe),
    )  # fmt: skip
    if not (method.compares or task.compares_as_usual):
        method.strip()
        raise RecipeError(f"--distance {recipe.train.distance}: {name} compares no outputs as it is set. Leave it out.")
    return method


def proved_once(recipe: Recipe, last: Path | None) -> Known:
    """What the first rank alone proves, and nobody where the run that goes on from `last` has proved the same.

    A rank whose digest is another than the first one's proves for itself.
    """

    def known(digest: str, prove: Callable[[], Found]) -> Found:
        def find() -> tuple[str, Found]:
            saved, found = _saved_proof(recipe, last)
            return digest, found if saved == digest else prove()

        theirs, found = first(find)
        return found if theirs == digest else prove()

    return known


def _saved_proof(recipe: Recipe, last: Path | None) -> tuple[str, Found]:
    """The digest of a proof and what it found, of a run whose network had the same settings; else of nothing."""
    try:
        payload = checkpoint.load(last, mapped=True) if last else {}
    except RunError:  # which is told, or mended, where the run goes on
        payload = {}
    if payload.get("args", {}).get("network") != recipe.to_dict()["network"]:
        return "", {}
    return payload.get("okdc", {}).get("proof") or ("", {})


def _refuse_contradictions(cohort: CohortSettings, kind: type[Method]) -> None:
    """RecipeError where a setting of branches is given to members that share nothing, or to a target alone."""
    names = [name for name in _OF_BRANCHES if getattr(cohort, name)]
    if kind.members == 1 and names and (cohort.members, names) != (1, ["members"]):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in names)
        raise RecipeError(
            f"{kind.__name__.lower()} trains the network without other members: leave out {flags}, or choose a method "
            "that has some (okdc methods)."
        )
    if cohort.peers and cohort.members not in (None, 1 + len(cohort.peers)):
        raise RecipeError(
            f"--members {cohort.members} and {len(cohort.peers)} --peers do not agree: with the target these are "
            f"{1 + len(cohort.peers)}. Leave out --members."
        )
    apart = "--peers" if cohort.peers else "--share none" if cohort.share == "none" else None
    names = ["cut", "private_stages", "trunk_gradient", *(["extra_blocks"] if cohort.peers else [])]
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(cohort, name) is not None]
    if apart and given:
        words = " and ".join(given)
        raise RecipeError(f"{words} cannot apply with {apart}, whose networks share nothing: leave it out.")


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.method.items() if key != "name"}


def needs(recipe: Recipe) -> tuple[Needs, int]:
    """What the method needs of the data, and how many views of each image that is with a view for each member."""
    kind = methods.get(recipe.method["name"])
    asked = kind.needs(**_settings(recipe))
    members = 1 + len(recipe.cohort.peers) if recipe.cohort.peers else recipe.cohort.members or kind.members
    return asked, members if asked.views else 1


def _peer(name: str, network: NetworkSettings, input_size: tuple[int, ...], classes: int, task: Task) -> nn.Module:
    alike = NetworkSettings(
        model=name, in_chans=network.in_chans, img_size=network.img_size, small_input=network.small_input
    )
    peer = networks.load(alike, classes)
    logits: Tensor = networks.check_input(peer, input_size, task)  # type: ignore[arg-type]
    if logits.shape[1] != classes:
        raise RecipeError(
            f"the peer {name} has {logits.shape[1]} outputs, the data {classes} classes: they must agree."
        )
    return peer
