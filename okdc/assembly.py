"""Putting a run together: the network and its data, the cohort that the method wants, each checked before training."""

from __future__ import annotations

import inspect as python_inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from okdc import _teacher, methods, networks
from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort
from okdc.data import Data, load, open_source, wrap
from okdc.errors import DataError, NetworkError, RecipeError
from okdc.methods import Method
from okdc.needs import Needs
from okdc.networks import stem
from okdc.ranks import first, rank, world
from okdc.recipe import CohortSettings, NetworkSettings, Recipe, runs_code
from okdc.training.machine import choose_device

log = logging.getLogger("okdc")


def network_and_data(model: Any, loader: Any, validation: Any, wanted: Recipe) -> tuple[nn.Module, Data]:
    """The target with a classifier for the data's classes, and the data as the target takes them."""
    target, data = (
        _own_loader(model, loader, validation, wanted) if loader is not None else _named_data(model, validation, wanted)
    )
    logits = networks.check_input(target, data.preprocess["input_size"])
    unknown = range(len(data.classes), logits.shape[1]) if data.validation_images is None else range(0)
    if unknown and not _outputs(model, wanted):  # the classes were counted in the labels: some may not occur
        data = replace(data, classes=(*data.classes, *map(str, unknown)))
    if logits.shape[1] != len(data.classes):
        if isinstance(model, nn.Module):
            advice = f"Give it {len(data.classes)} outputs, or name it instead of passing the object: okdc then resets "
            advice += "its classifier."
        elif runs_code(wanted.network.model):
            advice = f"Give the function an argument num_classes: okdc then calls it with {len(data.classes)}."
        else:
            advice = "Leave --num-classes out: it is found from the data."
        raise DataError(
            f"the network has {logits.shape[1]} outputs and {data.name} has {len(data.classes)} classes. {advice}"
        )
    if not any(p.requires_grad for p in target.parameters()):
        raise NetworkError("no parameter of the network requires a gradient: there is nothing to train. Unfreeze some.")
    if any(p.dtype != torch.float32 for p in target.parameters() if p.requires_grad):
        raise NetworkError("the network is not in float32, which okdc trains in (--amp for speed): network.float().")
    return target, data


def _own_loader(model: Any, loader: Any, validation: Any, wanted: Recipe) -> tuple[nn.Module, Data]:
    asked, _ = needs(wanted)
    data = wrap(
        loader, validation, num_classes=_outputs(model, wanted), seed=wanted.train.seed, needs=asked, rank=rank(),
        world=world(), timeout=wanted.train.timeout,
    )  # fmt: skip
    return _target(model, wanted, data.classes), data


def _outputs(model: Any, wanted: Recipe) -> int | None:
    return wanted.network.num_classes or getattr(model, "num_classes", None)  # timm's networks say it


def _named_data(model: Any, validation: Any, wanted: Recipe) -> tuple[nn.Module, Data]:
    if validation is not None:
        raise DataError(
            "a validation loader was given without a training loader: okdc.compress(model, loader, validation)."
        )
    if wanted.data.dataset_download:  # by one process, and then it is there
        first(lambda: open_source(wanted.data, wanted.train.seed) and None)
    source = open_source(wanted.data, wanted.train.seed)
    target = _target(model, wanted, source.classes)
    config = networks.data_config(
        target, wanted.network, mean=wanted.data.mean, std=wanted.data.std,
        interpolation=wanted.data.interpolation, crop_pct=wanted.data.crop_pct,
    )  # fmt: skip
    networks.check_input(target, config["input_size"])
    asked, views = needs(wanted)
    return target, load(
        source, wanted.data, config, batch_size=wanted.train.batch_size,
        validation_batch_size=wanted.train.validation_batch_size, seed=wanted.train.seed,
        device=choose_device(wanted.train.device), needs=asked, views=views, rank=rank(), world=world(),
        timeout=wanted.train.timeout,
    )  # fmt: skip


def _target(model: Any, wanted: Recipe, classes: tuple[str, ...]) -> nn.Module:
    if isinstance(model, type):
        raise NetworkError(f"{model.__name__} is a class, not a network: okdc.compress({model.__name__}(), ...).")
    if isinstance(model, nn.Module) and wanted.network.small_input:
        raise NetworkError(
            f"--small-input changes a network that okdc builds; the {type(model).__name__} that you pass is trained as "
            "it is. Change its first layers yourself, or give its name or package.module:function."
        )
    target = model if isinstance(model, nn.Module) else networks.load(wanted.network, len(classes))
    if wanted.network.small_input:
        changed = stem.described(stem.changes(target)) or "nothing to change: it takes small images as it is"
        log.warning("%s for small images: %s", wanted.network.model, changed)
    if not any(True for _ in target.parameters()):
        raise NetworkError(f"{type(target).__name__} has no parameters: there is nothing to train.")
    return target


def teacher(wanted: Recipe, data: Data, proved: bool = False) -> nn.Module | None:
    """The trained network that the recipe names, None where there is none; it is tried on the data unless `proved`."""
    name = wanted.cohort.teacher
    if name is None:
        return None
    network = _teacher.load(name, data.preprocess["input_size"], len(data.classes), wanted.network.model)
    if not proved:
        _teacher.prove(network, name, data, choose_device(wanted.train.device), wanted.train.timeout)
    return network


def method(
    target: nn.Module,
    wanted: Recipe,
    input_size: tuple[int, int, int],
    classes: int,
    named: bool,
    teacher: nn.Module | None = None,
    train_labels: Tensor | None = None,
) -> Method:
    """The cohort that the method wants, built around the target and proved, with the method that owns it.

    `input_size` (C, H, W) and `classes` are the data's. `named`: the recipe's name makes such a network, so that
    branches may be newly made rather than redrawn copies. `teacher`: for a method that needs one. `train_labels` (N,)
    are those of the training images, where they are known.
    """
    kind = methods.get(wanted.method["name"])
    cohort, network = wanted.cohort, wanted.network
    first = next(target.parameters())
    example = torch.randn(2, *input_size, device=first.device, dtype=first.dtype)
    _refuse_contradictions(cohort, kind)
    given: dict[str, Any] = {}
    if teacher is not None:
        given["teacher"] = teacher.to(first.device)
    if "train_labels" in python_inspect.signature(kind.__init__).parameters:
        given["train_labels"] = train_labels
    planned = python_inspect.signature(kind.plan).parameters  # settings that the plan depends on, too
    apart = kind.members == 1 or bool(cohort.peers) or (cohort.share or kind.share) == "none"
    anatomy = inspect(target, example, logits_only=apart and not kind.taps)
    plan = kind.plan(
        anatomy, members=cohort.members, extra_blocks=cohort.extra_blocks,
        private_stages=cohort.private_stages, cut=cohort.cut, share=cohort.share,
        peers=[_peer(name, network, input_size, classes).to(first.device) for name in cohort.peers],
        **{key: value for key, value in _settings(wanted).items() if key in planned},
    )  # fmt: skip
    maker = replace(network, pretrained=False, checkpoint=None)
    fresh = (lambda: networks.load(maker, classes)) if named and network.model in networks.names() else None
    started = network.pretrained or network.checkpoint is not None
    _refuse_ignored(cohort, plan)
    built = Cohort(
        target, example, plan, taps=kind.taps, pretrained=started, fresh=fresh, trunk_gradient=kind.trunk_gradient
    )
    try:
        return kind(built, **given, **_settings(wanted)).to(first.device)
    except BaseException:
        built.strip()
        raise


def _refuse_contradictions(cohort: CohortSettings, kind: type[Method]) -> None:
    """RecipeError where a setting of branches is given to members that share nothing, or to a target alone."""
    names = [name for name in ("members", "peers", "cut", "private_stages", "extra_blocks") if getattr(cohort, name)]
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
    names = ["cut", "private_stages", *(["extra_blocks"] if cohort.peers else [])]
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(cohort, name) is not None]
    if apart and given:
        words = " and ".join(given)
        raise RecipeError(f"{words} cannot apply with {apart}, whose networks share nothing: leave it out.")


def _refuse_ignored(cohort: CohortSettings, plan: list[Branch]) -> None:
    """RecipeError where the method planned its branches without a setting that was given."""
    ignored = []
    if not any(branch.cut for branch in plan):
        ignored += [name for name in ("cut", "private_stages") if getattr(cohort, name)]
    if cohort.extra_blocks and not any(any(branch.extra_blocks) for branch in plan):
        ignored.append("extra_blocks")
    if ignored:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in ignored)
        why = "are all as deep as the target" if ignored == ["extra_blocks"] else "share nothing with the target"
        raise RecipeError(f"{flags} has no effect here: the members of this method {why}. Leave it out.")


def _settings(wanted: Recipe) -> dict[str, Any]:
    return {key: value for key, value in wanted.method.items() if key != "name"}


def needs(wanted: Recipe) -> tuple[Needs, int]:
    """What the method needs of the data, and how many views of each image."""
    kind = methods.get(wanted.method["name"])
    asked = kind.needs(**_settings(wanted))
    members = 1 + len(wanted.cohort.peers) if wanted.cohort.peers else wanted.cohort.members or kind.members
    return asked, members if asked.views else 1


def _peer(name: str, network: NetworkSettings, input_size: tuple[int, ...], classes: int) -> nn.Module:
    alike = NetworkSettings(
        model=name, in_chans=network.in_chans, img_size=network.img_size, small_input=network.small_input
    )
    peer = networks.load(alike, classes)
    logits: Tensor = networks.check_input(peer, input_size)  # type: ignore[arg-type]
    if logits.shape[1] != classes:
        raise RecipeError(
            f"the peer {name} has {logits.shape[1]} outputs, the data {classes} classes: they must agree."
        )
    return peer


@contextmanager
def at_home(target: nn.Module) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """The target goes back to the device and memory formats that it had, and, when training fails, to its modes.

    What is yielded takes a network of the same names there.
    """
    home = next(target.parameters()).device
    modes = {module: module.training for module in target.modules()}
    channels_last = {name for name, tensor in _tensors(target) if _is_channels_last(tensor)}

    def settle(network: nn.Module) -> nn.Module:
        network.to(home).to(memory_format=torch.contiguous_format)
        for name, tensor in _tensors(network):
            if name in channels_last and tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        return network

    try:
        yield settle
    except BaseException:
        for module, mode in modes.items():
            module.training = mode
        raise
    finally:
        settle(target)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(network.named_parameters(), network.named_buffers())


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether it says so: a 1x1 convolution's weight is the same in both formats."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
