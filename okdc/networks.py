"""Networks by name: timm's, torchvision's, the user's own function, a folder that okdc saved; what images they take."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import resolve_model_input_args
from torch import Tensor, nn

from okdc import _cifar, _stem, _torchvision, _weights  # noqa: F401  (_cifar registers resnet32_cifar and its like with timm)
from okdc.errors import NetworkError, nearest
from okdc.recipe import NetworkSettings, runs_code
from okdc.recipe import load as load_recipe
from okdc.tasks.outputs import alone, described

_TORCHVISION = _torchvision.PREFIX
_DOWNLOADERS = ("huggingface_hub", "httpx", "requests", "urllib", "urllib3")
_OWN_FLAGS = {"drop_rate": "drop", "drop_path_rate": "drop_path"}
_FLAGS = {name: name for name in ("num_classes", "in_chans", "img_size", "pretrained")} | _OWN_FLAGS


def load(settings: NetworkSettings, num_classes: int | None = None, *, typed: Collection[str | None] = ()) -> nn.Module:
    """The network that `settings` names, with `num_classes` outputs (its own number when nobody says).

    A run or bundle that is named may itself name `package.module:function`; that is run only if it is among `typed`.
    Raises NetworkError if it does not exist, cannot be built or downloaded, or its checkpoint is of another network.
    """
    if _is_folder(settings.model):
        return load(_saved(Path(settings.model), settings, typed), num_classes)
    classes = _agreed_classes(settings, num_classes)
    network = _build(settings, classes)
    # A checkpoint may be of the network as its library builds it, or as it was after its stem had been changed.
    stem_later = settings.checkpoint is not None and _weights.fits(network, settings.checkpoint)
    if settings.small_input and not stem_later:
        _small_input(network, settings)
    if settings.checkpoint is not None:
        _weights.load(network, settings.checkpoint)  # with the checkpoint's own classifier: the match can be strict
        if classes is not None and classes != _weights.num_classes(network):
            _weights.reset_classifier(network, classes)
    if settings.small_input and stem_later:
        _small_input(network, settings)
    return network


def names() -> list[str]:
    """Every name that needs no path, sorted: timm's (okdc's CIFAR networks among them), then torchvision's."""
    return timm.list_models() + [_TORCHVISION + name for name in _torchvision.names()]


def arguments(settings: NetworkSettings) -> dict[str, Any]:
    """What timm or torchvision need beside name and classes to make this network again, without its weights."""
    if settings.model.startswith(_TORCHVISION):
        return _torchvision.arguments(settings)
    return dict(settings.model_kwargs)


def data_config(
    network: nn.Module,
    settings: NetworkSettings,
    *,
    image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> dict[str, Any]:
    """How images become the network's input: input_size (C, H, W), mean, std, interpolation, crop_pct and crop_mode.

    The settings' img_size wins, then `image_size` (H, W), then the network's own; a network that states none gets
    ImageNet's values. The other keywords override. Raises NetworkError for means that do not fit the channels.
    """
    own = _torchvision.data_config(settings.model) or getattr(network, "pretrained_cfg", None) or {}
    channels = settings.in_chans
    _, *own_size = own.get("input_size") or (channels, 224, 224)
    if settings.model.startswith(_TORCHVISION) and isinstance(getattr(network, "image_size", None), int):
        own_size = [network.image_size] * 2  # type: ignore[list-item]  # not that of weights that were not asked for
    side = settings.img_size
    height, width = (side, side) if side else image_size or own_size
    given = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, channels):
            raise NetworkError(f"data.{name} has {len(values)} values, but the network takes {channels} channels.")
    config = timm.data.resolve_data_config({"input_size": (channels, height, width), **given}, pretrained_cfg=own)
    for name in ("mean", "std"):
        if len(config[name]) != channels:  # a network for colours given grey or multispectral images
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config


def check_input(network: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """The logits, (1, classes), of one black image of `input_size` (C, H, W); raises NetworkError if there are none."""
    channels, height, width = input_size
    logits = _try_input(network, input_size)
    if isinstance(logits, Tensor):
        return logits
    if not isinstance(logits, Exception):
        raise NetworkError(
            f"{_name(network)} returns {described(logits)}, expected one tensor of logits (batch, classes). "
            f"{alone(logits)}"
        )
    reason = str(logits).strip().splitlines()[0] if str(logits).strip() else type(logits).__name__
    sizes = [side for side in (16, 32, 64, 96, 128, 224, 256, 299, 384) if side != height or side != width]
    takes = next((side for side in sizes if isinstance(_try_input(network, (channels, side, side)), Tensor)), None)
    if takes is None:
        advice = "Is --in-chans right?"
    elif takes > min(height, width):
        advice = f"Images smaller than the network takes: --img-size {takes} works (smaller images are enlarged)."
    else:
        advice = f"The network was built for another size: --img-size {takes} works."
    raise NetworkError(f"{_name(network)} cannot take images of {channels}x{height}x{width}: {reason}. {advice}")


def _name(network: nn.Module) -> str:
    return (getattr(network, "pretrained_cfg", None) or {}).get("architecture") or type(network).__name__


@torch.no_grad()
def _try_input(network: nn.Module, input_size: tuple[int, int, int]) -> Any:
    """The network's output for a black image in eval mode, or the exception raised; the network is left as it was."""
    training = {module: module.training for module in network.modules()}
    weight = next(network.parameters(), torch.zeros(()))
    try:
        return network.eval()(torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype))
    except Exception as error:  # whatever a stranger's forward raises is the answer
        return error
    finally:
        for module, mode in training.items():
            module.training = mode


def _agreed_classes(settings: NetworkSettings, num_classes: int | None) -> int | None:
    asked = settings.num_classes
    if asked is not None and num_classes is not None and asked < num_classes:
        raise NetworkError(
            f"network.num_classes is {asked}, but the data has {num_classes} classes. "
            "Leave --num-classes out: it is found from the data."
        )
    return num_classes if asked is None else asked


def _small_input(network: nn.Module, settings: NetworkSettings) -> None:
    if settings.img_size is None:
        raise NetworkError("--small-input needs the side of the images in pixels: --img-size 32.")
    _stem.make_small(network, (settings.in_chans, settings.img_size, settings.img_size))


def _is_folder(name: str) -> bool:
    special = name.startswith((_TORCHVISION, "hf-hub:", "hf_hub:", "local-dir:")) or runs_code(name)
    return not special and Path(name).is_dir()


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
    if local and not (Path(name.partition(":")[2]) / "config.json").is_file():
        raise NetworkError(f"{name} has no config.json: expected a folder that timm or okdc export saved.")
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
        return timm.create_model(pretrained=settings.pretrained, **arguments)
    except Exception as error:
        raise _explained(error, settings) from error


def _from_torchvision(settings: NetworkSettings, classes: int | None) -> nn.Module:
    if settings.model.removeprefix(_TORCHVISION) not in _torchvision.names():
        raise _unknown(settings.model)
    for flag, given in (("drop", settings.drop), ("drop_path", settings.drop_path)):
        if given is not None:
            raise NetworkError(
                f"torchvision networks have no common {flag} argument: give the network's own, "
                f"such as --model-kwargs dropout={given}."
            )
    try:
        network = _torchvision.build(settings)
    except Exception as error:
        raise _explained(error, settings) from error
    if settings.in_chans != 3:
        _stem.change(network, _stem.other_channels(network, settings.in_chans))
    if classes is not None and classes != _weights.num_classes(network):
        _weights.reset_classifier(network, classes)
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


def _saved(folder: Path, asked: NetworkSettings, typed: Collection[str | None]) -> NetworkSettings:
    """The settings that rebuild, with its weights, the network saved in a bundle or run folder."""
    recipe, best = folder / "recipe.yaml", folder / "model_best.pth.tar"
    if (folder / "config.json").is_file():
        saved = _of_bundle(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")), asked)
    elif recipe.is_file() and best.is_file():
        network = load_recipe(recipe, typed=None).network
        saved = _merged(replace(network, pretrained=False, checkpoint=asked.checkpoint or str(best)), asked)
    else:
        raise NetworkError(
            f"{folder} is neither a bundle (config.json) nor a run (recipe.yaml and model_best.pth.tar) of okdc."
        )
    if runs_code(saved.model) and saved.model not in typed:
        raise NetworkError(
            f"{folder} holds the network of {saved.model}, which is Python code that is not run unasked. "
            f"If you trust it, type --model {saved.model}, or give a function of yours that loads it, as "
            "package.module:function."
        )
    return saved


def _of_bundle(folder: Path, config: dict[str, Any], asked: NetworkSettings) -> NetworkSettings:
    own = config.get("okdc", {})
    name = own.get("base") or config.get("architecture", "")
    if timm.is_model(name) and not own.get("changes"):
        return replace(asked, model=f"local-dir:{folder}", pretrained=True)
    saved = NetworkSettings(model=name, checkpoint=asked.checkpoint or str(folder / "model.safetensors"))
    if own.get("changes"):  # made again from the settings that made them
        channels, _, side = config["pretrained_cfg"]["input_size"]
        small = any("stride" in (change or ["stride"]) for change in own["changes"].values())
        saved = replace(saved, in_chans=channels, small_input=small, img_size=side if small else None)
    arguments = {k: v for k, v in (config.get("model_args") or {}).items() if k not in ("num_classes", "in_chans")}
    return _merged(replace(saved, model_kwargs=arguments), asked)


def _merged(saved: NetworkSettings, asked: NetworkSettings) -> NetworkSettings:
    """The saved network with what was asked of it now: everything but its name that is not at its default."""
    kept, default = ("model", "pretrained", "checkpoint", "num_classes"), NetworkSettings()
    changed = {k: v for k, v in vars(asked).items() if k not in kept and v != getattr(default, k)}
    return replace(saved, **changed)


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
        return NetworkError(
            f"{name} could not be downloaded ({type(error).__name__}): check the connection, "
            "or give a local file with --checkpoint or a folder with local-dir:PATH."
        )
    if isinstance(error, (ValueError, TypeError, RuntimeError, AssertionError, KeyError)):
        return NetworkError(f"{name} could not be built: {text.splitlines()[0] if text else type(error).__name__}")
    return error
