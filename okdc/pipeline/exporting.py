"""A saved student becomes a bundle, and a bundle is verified again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from okdc import deploy, networks, tasks
from okdc.data import Data, agreed, complete, load, open_source
from okdc.deploy import hub
from okdc.errors import ExportError, NetworkError, refuse_address
from okdc.networks.saved import config_of
from okdc.pipeline import run_folder
from okdc.pipeline.facts import command
from okdc.recipe import LOADER, STATED, DataSettings, NetworkSettings, Recipe, override
from okdc.recipe import load as load_recipe
from okdc.system.saying import say
from okdc.system.signals import stopping
from okdc.tasks.task import Task

if TYPE_CHECKING:
    from okdc.verification.schema import Verification


def export(
    source: str | Path | nn.Module,
    *,
    output: str | Path | None = None,
    model: str | None = None,
    push_to_hub: str | None = None,
    **settings: Any,
) -> Verification:
    """Write a bundle of a run's student, a saved student or a named network, and verify it; returns the verification.

    source: a run folder, a saved student, the name of a network, or a module.
    output: the bundle's folder, by default `source`/export.
    model: the package.module:function that a run trained, which runs only if it is named here.
    push_to_hub: the repository (USER/NAME) on the Hugging Face hub that gets the bundle if it is fit to ship.
    settings: those of the recipe's export section, and `data`, the images to verify on (a run's own when not given),
    and mean, std, interpolation and crop_pct, where nobody knows yet how these are prepared; of a module that does not
    say so itself, also img_size, else 224.
    """
    refuse_address(output, "--output")
    if push_to_hub:
        hub.check(push_to_hub)
    is_object = isinstance(source, nn.Module)
    if not is_object:
        refuse_address(source, "the network")
    found = None if is_object else _of_run(Path(source), settings)  # type: ignore[arg-type]
    known = found is not None
    found = found or _of_name(type(source).__name__ if is_object else str(source), settings)
    student = source if isinstance(source, nn.Module) else found.load(model)
    config = _preprocessing(found, student, {name: settings[name] for name in STATED if settings.get(name) is not None})
    data = _images(found.recipe, config, found.task) if known or "data" in settings else None
    folder = Path(output) if output else found.folder / "export"
    stopped = f"Stopped: nothing was put in {folder}. Begin again with: {command()}"
    with run_folder.alone(folder.parent), stopping(lambda: say(stopped, always=True)):
        verification = deploy.export_bundle(
            student, data, found.recipe.export, folder, arch=found.network.model,
            model_args=networks.arguments(found.network), info=found.info | {"command": command()},
            preprocess=config, classes=found.classes or (data.classes if data else _numbered(student, config)),
            task=found.task,
        )  # fmt: skip
    if not (known or deploy.is_known(config)):
        say(f"{folder}: {deploy.UNKNOWN}")
    if push_to_hub:
        say(f"Pushed to {hub.push(folder, push_to_hub)}")
    return verification


def verify(bundle: str | Path, *, device: str = "cpu", **settings: Any) -> Verification:
    """Verify a bundle, or the bundle of a run, again on this machine; settings as for `export`."""
    refuse_address(bundle, "the bundle")
    folder = Path(bundle)
    if not folder.exists():
        raise ExportError(f"{bundle} does not exist: expected a run folder, or the bundle in its export/.")
    run = folder if run_folder.is_run(folder) else folder.parent
    folder = folder / "export" if run == folder else folder
    if run_folder.is_run(run) and not folder.exists():
        raise ExportError(f"{run} is a run that has not been exported yet: okdc export {run} --onnx")
    facts = deploy.read(folder)
    has_recipe = (run / run_folder.RECIPE).is_file()
    recipe = override(load_recipe(run / run_folder.RECIPE, typed=None) if has_recipe else Recipe(), settings)
    asked = settings.keys() & {"val_split", "path_column", "label_column"}
    if asked and "data" not in settings and (not has_recipe or recipe.data.data == LOADER):
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in sorted(asked))
        raise ExportError(f"{flags} of which data? {folder} does not say it: --data DIR")
    data = _images(recipe, facts["preprocess"], deploy.task_of(folder)) if has_recipe or "data" in settings else None
    return deploy.verify_bundle(folder, data, recipe.export, device=device)


@dataclass(frozen=True)
class _Source:
    """What is exported: how its network is built, and what is known of it."""

    name: str
    folder: Path  # beside which the bundle is put
    recipe: Recipe
    network: NetworkSettings
    classes: tuple[str, ...] = ()
    preprocess: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    task: Task = field(default_factory=tasks.get)

    def load(self, typed: str | None) -> nn.Module:
        """The network with its weights; `typed` is the function that may run for it."""
        saved = NetworkSettings(model=self.name, pretrained=not Path(self.name).exists())
        return networks.load(saved, len(self.classes) or None, typed=[typed])


def _of_run(folder: Path, settings: dict[str, Any]) -> _Source | None:
    """The student of a run folder; None for what is none."""
    known = run_folder.read_student(folder)
    if known is None:
        return None
    if not known["rebuildable"]:
        raise NetworkError(
            f"{folder} trained an object, which cannot be built again from here. Call .export() on the Result in "
            "Python, or name the network package.module:function when it is trained."
        )
    trained = load_recipe(folder / run_folder.RECIPE, typed=None)
    trained = replace(trained, data=replace(trained.data, exif=known["preprocess"].get("exif", False)))
    recipe = override(trained, settings)
    stated = {name: getattr(trained.data, name) for name in STATED}
    same = replace(recipe.data, **stated) == trained.data  # of other images the report says nothing
    info = {
        "recipe": recipe.to_dict(),
        "title": folder.name,
        "metrics": run_folder.read_metrics(folder) if same else {},
    }
    network = replace(recipe.network, model=known["arch"])
    return _Source(
        str(folder), folder, recipe, network, tuple(known["classes"]), known["preprocess"], info, tasks.of(known)
    )


def _of_name(name: str, settings: dict[str, Any]) -> _Source:
    """A network by its name, a bundle, or an object of that name."""
    recipe, folder = override(Recipe(), settings), Path(name)
    network = replace(recipe.network, model=name, pretrained=True)
    config = config_of(folder) or {}
    if "okdc" not in config:
        return _Source(name, Path(folder.name), recipe, network)
    facts = deploy.read(folder)  # with its classes, and how its images are read
    made_with = config.get("model_args") or {}
    network = replace(
        network,
        model=config["okdc"].get("base") or config["architecture"],
        in_chans=facts["preprocess"]["input_size"][0],
        model_kwargs={k: v for k, v in made_with.items() if k not in ("num_classes", "in_chans")},
    )
    return _Source(
        name, Path(folder.name), recipe, network, facts["classes"], facts["preprocess"], task=deploy.task_of(folder)
    )


def _preprocessing(found: _Source, student: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """How the images of a student are prepared, with what is `given` where that is not known; input_size alone where it
    stays so. DataError where something else is known."""
    known = found.preprocess
    if not known:
        return _of_network(found, student, given)
    if not given:
        return known
    if not deploy.is_known(known):
        return complete(known, given)
    return agreed(known, given, f"{found.name} was trained with")


def _of_network(found: _Source, student: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The same for a network that okdc did not train: said as it states it itself, else not known."""
    stated = networks.states_preprocessing(student, found.network)
    config = networks.data_config(student, found.network, **given if stated else {})
    size = "x".join(map(str, config["input_size"]))
    if not stated:
        if not found.network.img_size:
            say(f"Input {size}, as the network states none: another is given by img_size=.")
        unknown = {"input_size": config["input_size"]}
        return complete(unknown, given) if given else unknown
    if found.name not in networks.names() and not given:  # weights of somebody's own
        shown = ", ".join(f"{key} {config[key]}" for key in STATED)
        say(f"Input {size}, {shown}: as the network states it. If it was trained on others: mean=, std= and so on.")
    return config


def _images(recipe: Recipe, config: dict[str, Any], task: Task) -> Data | None:
    """Validation images for a student that is already trained; None where they came from a loader, which is gone."""
    if recipe.data.data == LOADER:
        return None
    if not deploy.is_known(config):
        raise ExportError(
            f"{recipe.data.data} cannot be prepared for this student: {deploy.UNKNOWN} (with --data, too)."
        )
    # Training images are hardly read; photos are turned as they were when it learned, whatever is the default now.
    settings: DataSettings = replace(recipe.data, workers=0, resident="off", exif=config.get("exif", False))
    source = open_source(settings, recipe.train.seed, task)
    size = recipe.train.validation_batch_size or recipe.train.batch_size
    config = {**config, "input_size": tuple(config["input_size"])}
    return load(
        source, settings, config, batch_size=1, validation_batch_size=size, seed=recipe.train.seed, device="cpu"
    )


def _numbered(student: nn.Module, config: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(i) for i in range(networks.check_input(student, config["input_size"]).shape[1]))
