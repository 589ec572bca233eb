"""How a network that a run or a bundle holds is built again."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from okdc.errors import NetworkError
from okdc.networks.from_torchvision import PREFIX
from okdc.recipe import NetworkSettings, runs_code
from okdc.recipe import load as load_recipe

CONFIG = "config.json"


def is_folder(name: str) -> bool:
    special = name.startswith((PREFIX, "hf-hub:", "hf_hub:", "local-dir:")) or runs_code(name)
    return not special and Path(name).is_dir()


def config_of(folder: Path) -> dict[str, Any] | None:
    """What timm or okdc noted of the network that it saved in this folder; None where it is none of theirs."""
    file = folder / CONFIG
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def settings_of(folder: Path, asked: NetworkSettings, typed: Collection[str | None]) -> NetworkSettings:
    """The settings that rebuild, with its weights, the network saved in a bundle or run folder."""
    recipe, best = folder / "recipe.yaml", folder / "model_best.pth.tar"
    if (config := config_of(folder)) is not None:
        saved = of_bundle(folder, config, asked)
    elif recipe.is_file() and best.is_file():
        network = load_recipe(recipe, typed=None).network
        saved = _merged(replace(network, pretrained=False, checkpoint=asked.checkpoint or str(best)), asked)
    else:
        raise NetworkError(
            f"{folder} is neither a bundle ({CONFIG}) nor a run (recipe.yaml and model_best.pth.tar) of okdc."
        )
    if runs_code(saved.model) and saved.model not in typed:
        raise NetworkError(
            f"{folder} holds the network of {saved.model}, which is Python code that is not run unasked. "
            f"If you trust it, type --model {saved.model}, or give a function of yours that loads it, as "
            "package.module:function."
        )
    return saved


def of_bundle(folder: Path, config: dict[str, Any], asked: NetworkSettings) -> NetworkSettings:
    own = config.get("okdc", {})
    name = own.get("base") or config.get("architecture", "")
    if timm.is_model(name) and not (own.get("changes") or own.get("head")):
        return replace(asked, model=f"local-dir:{folder}", pretrained=True)
    saved = NetworkSettings(model=name, checkpoint=asked.checkpoint or str(folder / "model.safetensors"))
    channels, _, side = (config.get("pretrained_cfg") or {}).get("input_size") or (3, 0, 0)
    if own.get("changes"):  # made again from the settings that made them
        small = any("stride" in (change or ["stride"]) for change in own["changes"].values())
        saved = replace(saved, in_chans=channels, small_input=small, img_size=side if small else None)
    if head := own.get("head"):  # which is built on a map of this size
        saved = replace(
            saved, task=own["task"], in_chans=channels, img_size=side, head=head["head"], head_width=head["width"]
        )
    arguments = {k: v for k, v in (config.get("model_args") or {}).items() if k not in ("num_classes", "in_chans")}
    return _merged(replace(saved, model_kwargs=arguments), asked)


def _merged(saved: NetworkSettings, asked: NetworkSettings) -> NetworkSettings:
    """The saved network with what was asked of it now: everything but its name that is not at its default."""
    kept, default = ("model", "pretrained", "checkpoint", "num_classes"), NetworkSettings()
    changed = {k: v for k, v in vars(asked).items() if k not in kept and v != getattr(default, k)}
    return replace(saved, **changed)
