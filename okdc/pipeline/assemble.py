"""Putting a run together: the network and its data, the cohort that the method wants, each checked before training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from okdc import deploy, networks, tasks
from okdc.anatomy.modes import keep_modes
from okdc.data import Data, load, open_together, wrap
from okdc.errors import DataError, NetworkError
from okdc.networks import stem
from okdc.pipeline import opening, saved_classes
from okdc.pipeline.assemble_cohort import needs
from okdc.ranks import first, rank, world
from okdc.recipe import STATED, NetworkSettings, Recipe, TrainSettings, runs_code
from okdc.tasks.task import Task
from okdc.training.machine import choose_device

_KNOWN = ("timm", "torchvision", "okdc")  # packages whose networks have been exported

log = logging.getLogger("okdc")

# The target, the size (C, H, W) of the images that it is given, and what makes the data once it is known to take them.
Prepared = tuple[nn.Module, tuple[int, int, int], Callable[[], Data]]


def network_and_data(model: Any, loader: Any, validation: Any, recipe: Recipe) -> tuple[nn.Module, Data]:
    """The target with an output for each of the data's classes, and the data as the target takes them."""
    task = tasks.get(recipe.network.task)
    target, input_size, prepare = (
        _own_loader(model, loader, validation, recipe, task)
        if loader is not None
        else _named_data(model, validation, recipe, task)
    )
    outputs = networks.check_input(target, input_size, task).shape[1]
    data = prepare()
    unknown = range(len(data.classes), outputs) if data.validation_images is None else range(0)
    if unknown and not _outputs(model, recipe):  # the classes were counted in the labels: some may not occur
        data = replace(data, classes=(*data.classes, *map(str, unknown)))
    if outputs != len(data.classes):
        if isinstance(model, nn.Module):
            advice = f"Give it {len(data.classes)} outputs, or name it instead of passing the object: okdc then resets "
            advice += "its classifier."
        elif runs_code(recipe.network.model):
            advice = f"Give the function an argument num_classes: okdc then calls it with {len(data.classes)}."
        else:
            advice = "Leave --num-classes out: it is found from the data."
        raise DataError(f"the network has {outputs} outputs and {data.name} has {len(data.classes)} classes. {advice}")
    if not any(p.requires_grad for p in target.parameters()):
        raise NetworkError("no parameter of the network requires a gradient: there is nothing to train. Unfreeze some.")
    if any(p.dtype != torch.float32 for p in target.parameters() if p.requires_grad):
        raise NetworkError("the network is not in float32, which okdc trains in (--amp for speed): network.float().")
    return target, data


def _own_loader(model: Any, loader: Any, validation: Any, recipe: Recipe, task: Task) -> Prepared:
    asked, _ = needs(recipe)
    if recipe.data.balanced_sampling:  # of a recipe: okdc.compress refuses it where it is typed
        raise DataError(
            "balanced_sampling orders images that okdc reads, and a loader of your own has its order. Give the loader "
            "torch's WeightedRandomSampler and leave it out of the recipe, or give data=FOLDER instead of the loader."
        )
    data = wrap(
        loader, validation, num_classes=_outputs(model, recipe), seed=recipe.train.seed, needs=asked, rank=rank(),
        world=world(), timeout=recipe.train.timeout, stated={name: getattr(recipe.data, name) for name in STATED},
        task=task,
    )  # fmt: skip
    size, side = data.preprocess["input_size"], recipe.network.img_size
    if side and size[1:] != (side, side):
        raise DataError(
            f"img_size is {side}, and the images of the loader are {size[1]}x{size[2]}: make them of that size there, "
            "or leave img_size out."
        )
    return _target(model, recipe, data.classes), size, lambda: data


def _outputs(model: Any, recipe: Recipe) -> int | None:
    return recipe.network.num_classes or getattr(model, "num_classes", None)  # timm's networks say it


def _named_data(model: Any, validation: Any, recipe: Recipe, task: Task) -> Prepared:
    if validation is not None:
        raise DataError(
            "a validation loader was given without a training loader: okdc.compress(model, loader, validation)."
        )
    source = open_together(recipe.data, recipe.train.seed, task)
    target = _target(model, recipe, source.classes)
    config = networks.data_config(
        target, recipe.network, mean=recipe.data.mean, std=recipe.data.std,
        interpolation=recipe.data.interpolation, crop_pct=recipe.data.crop_pct,
    )  # fmt: skip
    hint = (
        None
        if recipe.network.img_size
        else opening.small_images(source.train, config["input_size"], recipe.network.model)
    )
    if hint:
        log.warning("%s: %s", recipe.data.data, hint)
    asked, views = needs(recipe)
    return target, config["input_size"], lambda: load(
        source, recipe.data, config, batch_size=recipe.train.batch_size,
        validation_batch_size=recipe.train.validation_batch_size, seed=recipe.train.seed,
        device=choose_device(recipe.train.device), needs=asked, views=views, rank=rank(), world=world(),
        timeout=recipe.train.timeout,
    )  # fmt: skip


def _target(model: Any, recipe: Recipe, classes: tuple[str, ...]) -> nn.Module:
    if isinstance(model, type):
        raise NetworkError(f"{model.__name__} is a class, not a network: okdc.compress({model.__name__}(), ...).")
    if isinstance(model, nn.Module) and recipe.network.small_input:
        raise NetworkError(
            f"--small-input changes a network that okdc builds; the {type(model).__name__} that you pass is trained as "
            "it is. Change its first layers yourself, or give its name or package.module:function."
        )
    target = model if isinstance(model, nn.Module) else _built(recipe.network, classes)
    if recipe.network.small_input:
        changed = stem.described(stem.changes(target)) or "nothing to change: it takes small images as it is"
        log.warning("%s for small images: %s", recipe.network.model, changed)
    if not any(True for _ in target.parameters()):
        raise NetworkError(f"{type(target).__name__} has no parameters: there is nothing to train.")
    return target


def _built(settings: NetworkSettings, classes: tuple[str, ...]) -> nn.Module:
    network = networks.load(settings, len(classes))
    if settings.checkpoint or settings.pretrained or Path(settings.model).exists():
        input_size = networks.data_config(network, settings)["input_size"]
        saved_classes.start(network, settings.checkpoint or settings.model, classes, input_size)
    return network


def refuse_unfit(target: nn.Module, input_size: tuple[int, int, int], recipe: Recipe) -> None:
    """NetworkError or ExportError, in seconds, for a network of which nothing could ship after the last epoch.

    An export on trial takes seconds; networks of timm and torchvision are known to do it (tests/zoo).
    """
    task = tasks.get(recipe.network.task)
    networks.refuse_unsteady(target, input_size, task)
    if type(target).__module__.partition(".")[0] not in _KNOWN:
        first(lambda: deploy.refuse_unexportable(target, input_size, recipe.export, task))


@contextmanager
def at_home(target: nn.Module, settings: TrainSettings) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """The target goes back to the device and memory formats that it had, and, when training fails, to its modes.

    What is yielded takes a network of the same names there. What `settings` freeze, and their gradient checkpointing,
    is so for as long as it trains: what comes back is the user's own, and files are written of the plain network.
    """
    learning = [parameter for parameter in target.parameters() if parameter.requires_grad]
    has_it = any(getattr(module, "grad_checkpointing", False) for module in target.modules())
    switched = settings.grad_checkpointing and not has_it
    home = next(target.parameters()).device
    put_back = keep_modes(target)
    channels_last = {name for name, tensor in _tensors(target) if _is_channels_last(tensor)}

    def settle(network: nn.Module) -> nn.Module:
        if switched:
            networks.keep_activations(network)
        network.to(home).to(memory_format=torch.contiguous_format)
        for name, tensor in _tensors(network):
            if name in channels_last and tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        return network

    try:
        networks.freeze(target, settings.freeze)
        if switched:
            networks.checkpoint_gradients(target)
        yield settle
    except BaseException:
        put_back()
        raise
    finally:
        settle(target)
        for parameter in learning:
            parameter.requires_grad_(True)


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(network.named_parameters(), network.named_buffers())


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether it says so: a 1x1 convolution's weight is the same in both formats."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
