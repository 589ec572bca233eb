"""Networks by name: timm's, torchvision's, the user's own function, a folder that okdc saved; what images they take."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.models import resolve_model_input_args
from torch import nn

from okdc.errors import NetworkError, first_line, nearest, refuse_address
from okdc.networks import (
    cifar,  # noqa: F401  (registers resnet32_cifar and its like with timm)
    download,
    from_torchvision,
    stem,
    weights,
)
from okdc.networks.input import data_config
from okdc.networks.pose_head import POSE, PoseNetwork, with_pose_head
from okdc.networks.saved import CONFIG, config_of, is_folder, settings_of
from okdc.recipe import NetworkSettings, runs_code

_TORCHVISION = from_torchvision.PREFIX
_DOWNLOADERS = ("huggingface_hub", "httpx", "requests", "urllib", "urllib3")
_OWN_FLAGS = {"drop_rate": "drop", "drop_path_rate": "drop_path"}
_FLAGS = {name: name for name in ("num_classes", "in_chans", "img_size", "pretrained")} | _OWN_FLAGS


def load(settings: NetworkSettings, num_classes: int | None = None, *, typed: Collection[str | None] = ()) -> nn.Module:
    """The network that `settings` names, with `num_classes` outputs (its own number when nobody says).

    A run or bundle that is named may itself name `package.module:function`; that is run only if it is among `typed`.
    Raises NetworkError if it does not exist, cannot be built or downloaded, or its checkpoint is of another network.
    """
    if is_folder(settings.model):
        return load(settings_of(Path(settings.model), settings, typed), num_classes)
    classes = _agreed_classes(settings, num_classes)
    if settings.task == POSE and not runs_code(settings.model):
        return _with_head(settings, classes or 1)
    network = _build(settings, classes)
    refuse_address(settings.checkpoint, "--checkpoint")
    heads = _classifiers(network, settings) if settings.checkpoint is not None else []
    # A checkpoint may be of the network as its library builds it, or as it was after its stem had been changed.
    stem_later = settings.checkpoint is not None and weights.fits(network, settings.checkpoint, heads)
    if settings.small_input and not stem_later:
        _small_input(network, settings)
    if settings.checkpoint is not None:
        weights.load(network, settings.checkpoint, heads)  # with the classifier that it has: the match can be strict
        if classes is not None and classes != weights.num_classes(network, heads):
            weights.reset_classifier(network, classes, heads)
    if settings.small_input and stem_later:
        _small_input(network, settings)
    return network


def lacks_weights(settings: NetworkSettings) -> str | None:
    """Why the network of that name cannot start from pre-trained weights, in words; None where it can.

    Raises NetworkError for what is wrong beside the weights.
    """
    if is_folder(settings.model):
        return None
    if runs_code(settings.model):
        return f"{settings.model} is a function, and nothing says that its weights are trained (--pretrained does)"
    try:
        load(settings)
    except NetworkError as error:
        load(replace(settings, pretrained=False))
        return str(error).partition(". ")[0].partition(": ")[0]
    return None


def names() -> list[str]:
    """Every name that needs no path, sorted: timm's (okdc's CIFAR networks among them), then torchvision's."""
    return timm.list_models() + [_TORCHVISION + name for name in from_torchvision.names()]


def arguments(settings: NetworkSettings) -> dict[str, Any]:
    """What timm or torchvision need beside name and classes to make this network again, without its weights."""
    if settings.model.startswith(_TORCHVISION):
        return from_torchvision.arguments(settings)
    return dict(settings.model_kwargs)


def _agreed_classes(settings: NetworkSettings, num_classes: int | None) -> int | None:
    asked = settings.num_classes
    if asked is not None and num_classes is not None and asked < num_classes:
        raise NetworkError(
            f"network.num_classes is {asked}, but the data has {num_classes} classes. "
            "Leave --num-classes out: it is found from the data."
        )
    return num_classes if asked is None else asked


def _classifiers(network: nn.Module, settings: NetworkSettings) -> list[str]:
    return weights.classifier_names(network, data_config(network, settings)["input_size"])


def _with_head(settings: NetworkSettings, keypoints: int) -> PoseNetwork:
    """The backbone of that name with a head of heat maps; a checkpoint may be of the backbone or of both."""
    backbone = _build(settings, None)
    refuse_address(settings.checkpoint, "--checkpoint")
    heads = _classifiers(backbone, settings)
    whole = settings.checkpoint is None or not weights.fits(backbone, settings.checkpoint, heads)
    if settings.checkpoint is not None and not whole:
        weights.load(backbone, settings.checkpoint, heads)
    if settings.small_input:
        _small_input(backbone, settings)
    size = data_config(backbone, settings)["input_size"]
    head: Any = settings.head
    network = with_pose_head(backbone, keypoints, size, head=head, width=settings.head_width)
    if settings.checkpoint is not None and whole:
        weights.load(network, settings.checkpoint, [network.maps])
    return network


def _small_input(network: nn.Module, settings: NetworkSettings) -> None:
    if settings.img_size is None:
        raise NetworkError("--small-input needs the side of the images in pixels: --img-size 32.")
    stem.make_small(network, (settings.in_chans, settings.img_size, settings.img_size))


def _build(settings: NetworkSettings, classes: int | None) -> nn.Module:
    name = settings.model
    if name.startswith(_TORCHVISION):
        return _from_torchvision(settings, classes)
    if runs_code(name):
        return _from_function(settings, classes)
    return _from_timm(settings, classes)


def _from_timm(settings: NetworkSettings, classes: int | None) -> nn.Module:
    name = settings.model
    local = name.startswith("local-dir:")
    remote = name.startswith(("hf-hub:", "hf_hub:"))
    if local and config_of(Path(name.partition(":")[2])) is None:
        raise NetworkError(f"{name} has no {CONFIG}: expected a folder that timm or okdc export saved.")
    if not local and not remote and not timm.is_model(name.partition(".")[0]):
        raise _unknown(name)
    for argument in settings.model_kwargs.keys() & _FLAGS.keys():
        flag = "--" + _FLAGS[argument].replace("_", "-")
        raise NetworkError(f"network.model_kwargs: {argument} is a setting of its own: {flag}, not --model-kwargs.")
    try:
        arguments = resolve_model_input_args(
            name,
            {"img_size": settings.img_size},
            num_classes=classes,
            in_chans=settings.in_chans,
            drop_rate=settings.drop,
            drop_path_rate=settings.drop_path,
            **settings.model_kwargs,
        )
        fetches = settings.pretrained and settings.checkpoint is None  # all that is fetched would be written over
        with download.quick_to_fail() if fetches or remote else nullcontext():
            return timm.create_model(pretrained=fetches, **arguments)
    except Exception as error:
        raise _explained(error, settings) from error


def _from_torchvision(settings: NetworkSettings, classes: int | None) -> nn.Module:
    if settings.model.removeprefix(_TORCHVISION) not in from_torchvision.names():
        raise _unknown(settings.model)
    for flag, given in (("drop", settings.drop), ("drop_path", settings.drop_path)):
        if given is not None:
            raise NetworkError(
                f"torchvision networks have no common {flag} argument: give the network's own, "
                f"such as --model-kwargs dropout={given}."
            )
    try:
        network = from_torchvision.build(settings)
    except Exception as error:
        raise _explained(error, settings) from error
    if settings.in_chans != 3:
        stem.change(network, stem.other_channels(network, settings.in_chans))
    if classes is not None:
        heads = _classifiers(network, settings)
        if classes != weights.num_classes(network, heads):
            weights.reset_classifier(network, classes, heads)
    return network


def _from_function(settings: NetworkSettings, classes: int | None) -> nn.Module:
    """Call `package.module:function`, found as Python finds modules or in the working folder."""
    module_name, _, function_name = settings.model.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:  # the okdc script, unlike python -m, does not look here
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module is there; what it imports is not
        raise NetworkError(
            f"{settings.model}: there is no Python module {module_name}, neither installed nor in {os.getcwd()}."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise NetworkError(f"{module_name} has no function {function_name}.{nearest(function_name, known)}")
    kwargs = dict(settings.model_kwargs)
    parameters = inspect.signature(function).parameters.values()
    takes_classes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
    if classes is not None and takes_classes:
        kwargs.setdefault("num_classes", classes)
    try:
        inspect.signature(function).bind(**kwargs)
    except TypeError as error:
        raise NetworkError(f"{settings.model} cannot be called with {kwargs}: {error}. See --model-kwargs.") from error
    network = function(**kwargs)
    if not isinstance(network, nn.Module):
        raise NetworkError(f"{settings.model} returned a {type(network).__name__}, not a torch.nn.Module.")
    return network


def _unknown(name: str) -> NetworkError:
    if "/" in name and not name.startswith(_TORCHVISION):
        return NetworkError(
            f"no network {name!r}: there is no such folder. Type hf-hub:{name} for a network on the Hugging Face hub, "
            f"torchvision/NAME for torchvision's, local-dir:{name} for a folder of timm's."
        )
    return NetworkError(
        f"no network {name!r} in timm or torchvision.{nearest(name, names())} "
        "Other networks: hf-hub:ID, local-dir:PATH or package.module:function."
    )


def _explained(error: Exception, settings: NetworkSettings) -> Exception:
    """What went wrong in building the network, as a NetworkError if the user can mend it, else the error itself."""
    text = str(error).strip()
    name = settings.model
    argument = re.search(r"unexpected keyword argument '(\w+)'", text)
    if argument:
        flag = _OWN_FLAGS.get(argument[1])
        where = f"network.{flag}" if flag else f"network.model_kwargs: {argument[1]}"
        return NetworkError(f"{name} does not take {argument[1]}. Leave out {where}.")
    if "No pretrained weights exist" in text:
        return NetworkError(
            f"{name} has no pre-trained weights. Leave --pretrained out, or give a file with --checkpoint."
        )
    fetches = settings.pretrained or name.startswith(("hf-hub:", "hf_hub:"))
    module = type(error).__module__.partition(".")[0]
    if fetches and not name.startswith("local-dir:") and (isinstance(error, OSError) or module in _DOWNLOADERS):
        reason = str(error) if isinstance(error, download.Unreachable) else type(error).__name__
        return NetworkError(
            f"{name} could not be downloaded ({reason}): check the connection, "
            "or give a local file with --checkpoint or a folder with local-dir:PATH."
        )
    if isinstance(error, (ValueError, TypeError, RuntimeError, AssertionError, KeyError)):
        return NetworkError(f"{name} could not be built: {first_line(error)}")
    return error
