"""A saved student becomes a bundle, and a bundle is verified again."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from okdc import deploy, networks
from okdc.data import Data, load, open_source
from okdc.deploy import hub
from okdc.errors import NetworkError
from okdc.pipeline import run_folder
from okdc.pipeline.facts import command
from okdc.recipe import LOADER, DataSettings, NetworkSettings, Recipe, override
from okdc.recipe import load as load_recipe


def export(
    source: str | Path | nn.Module,
    *,
    output: str | Path | None = None,
    model: str | None = None,
    push_to_hub: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write a bundle of a run's student, a saved student or a named network, and verify it; returns the verification.

    output: the bundle's folder, by default `source`/export. model: the package.module:function that a run trained,
    which runs only if it is named here. push_to_hub: the repository (USER/NAME) on the Hugging Face hub that gets the
    bundle if it is fit to ship. settings: those of the recipe's export section, and `data`, the images to verify on (a
    run's own when not given).
    """
    if push_to_hub:
        hub.check(push_to_hub)
    name = type(source).__name__ if isinstance(source, nn.Module) else str(source)
    known = None if isinstance(source, nn.Module) else run_folder.read_student(Path(source))
    trained = load_recipe(Path(name) / run_folder.RECIPE, typed=None) if known else Recipe()
    wanted = override(trained, settings)
    if known and not known["rebuildable"]:
        raise NetworkError(
            f"{name} trained an object, which cannot be built again from here. Call .export() on the Result in "
            "Python, or name the network package.module:function when it is trained."
        )
    if isinstance(source, nn.Module):
        student = source
    else:
        saved = NetworkSettings(model=name, pretrained=not Path(name).exists())
        student = networks.load(saved, len(known["classes"]) if known else None, typed=[model])
    arch = known["arch"] if known else name
    network = replace(wanted.network if known else NetworkSettings(pretrained=True), model=arch)
    config = known["preprocess"] if known else networks.data_config(student, network)
    data = _images(wanted, config) if known or "data" in settings else None
    classes = known["classes"] if known else data.classes if data else _numbered(student, config)
    folder = Path(output) if output else (Path(name) if known else Path(Path(name).name)) / "export"
    info: dict[str, Any] = {"command": command()}
    if known:
        same = wanted.data == trained.data  # of other images the report says nothing
        metrics = run_folder.read_metrics(Path(name)) if same else {}
        info |= {"recipe": wanted.to_dict(), "title": Path(name).name, "metrics": metrics}
    with run_folder.alone(folder.parent):
        verification = deploy.export_bundle(
            student,
            data,
            wanted.export,
            folder,
            arch=arch,
            model_args=networks.arguments(network),
            info=info,
            preprocess=config,
            classes=classes,
        )
    if push_to_hub:
        print(f"Pushed to {hub.push(folder, push_to_hub)}", file=sys.stderr)
    return verification


def verify(bundle: str | Path, *, device: str = "cpu", **settings: Any) -> dict[str, Any]:
    """Verify a bundle, or the bundle of a run, again on this machine; settings as for `export`."""
    folder = Path(bundle)
    run = folder if (folder / run_folder.STUDENT).is_file() else folder.parent
    folder = folder / "export" if run == folder else folder
    facts = deploy.read(folder)
    has_recipe = (run / run_folder.RECIPE).is_file()
    wanted = override(load_recipe(run / run_folder.RECIPE, typed=None) if has_recipe else Recipe(), settings)
    data = _images(wanted, facts["preprocess"]) if has_recipe or "data" in settings else None
    return deploy.verify_bundle(folder, data, wanted.export, device=device)


def _images(wanted: Recipe, config: dict[str, Any]) -> Data | None:
    """Validation images for a student that is already trained; None where they came from a loader, which is gone."""
    if wanted.data.data == LOADER:
        return None
    settings: DataSettings = replace(wanted.data, workers=0, resident="off")  # training images are hardly read
    source = open_source(settings, wanted.train.seed)
    size = wanted.train.validation_batch_size or wanted.train.batch_size
    config = {**config, "input_size": tuple(config["input_size"])}
    return load(
        source, settings, config, batch_size=1, validation_batch_size=size, seed=wanted.train.seed, device="cpu"
    )


def _numbered(student: nn.Module, config: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(i) for i in range(networks.check_input(student, config["input_size"]).shape[1]))
