"""compress, export, verify: a run, and what it ships."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from okdc import recipe
from okdc.cli import completion, early, flags
from okdc.cli.group import main
from okdc.cli.output import show
from okdc.errors import ExportError, GateError, refuse_address

if TYPE_CHECKING:
    from okdc.verification.schema import Verification


@main.command(
    cls=flags.GroupedCommand, timm=True, short_help="Train your network with helper branches, remove them, export it."
)
@click.argument("folder", metavar="[DATA]", required=False, shell_complete=completion.complete_path)
@flags.recipe_option("recipe_name")
@click.option(
    "--preset", type=click.Choice(recipe.PRESETS),
    help="finetune: from pre-trained weights, 20 epochs; scratch: timm's 100. finetune, for your own images, if you "
    "give no recipe and do not say how to train.",
)  # fmt: skip
@click.option(
    "--with-baseline/--no-baseline", default=None,
    help="First train the network alone, as the baseline to compare with.  [on with --preset finetune]",
)  # fmt: skip
@click.option(
    "--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one setting of the recipe; repeatable."
)
@click.option(
    "--method",
    metavar="NAME|FILE.py:CLASS",
    help="How the members teach each other (okdc methods lists them), or a class of your own.",
    shell_complete=completion.complete_method,
)
@click.option("--method-kwargs", type=flags.KeyValue(), multiple=True, help="A setting of the method; repeatable.")
@click.option("--output", metavar="DIR", default="runs", show_default=True, help="Where run folders are made.")
@click.option("--experiment", metavar="NAME", help="Name of the run folder; NETWORK-METHOD-DATA if not given.")
@click.option(
    "--resume", metavar="auto|PATH", help="Go on from the run's last state (auto), or from this run or file.",
    shell_complete=completion.complete_path,
)  # fmt: skip
@click.option("--log-wandb", is_flag=True, help="The same as --log wandb; timm's flag.")
@click.option("--rendezvous", metavar="HOST:PORT", help="With --nodes: a free port of the first one; alike on all.")
@flags.settings("network", "cohort", "data", "train", "export")
def compress(
    folder: str | None,
    recipe_name: str | Path | None,
    preset: str | None,
    with_baseline: bool | None,
    sets: tuple[str, ...],
    method: str | None,
    method_kwargs: tuple[tuple[str, Any], ...],
    output: str,
    experiment: str | None,
    resume: str | None,
    log_wandb: bool,
    rendezvous: str | None,
    **_: Any,
) -> None:
    """Train your network together with helper branches, remove them, export the network and verify it.

    The command line wins over --set, which wins over the recipe or preset. If you give neither a recipe nor data, okdc
    trains on the real digits of digits/resnet18-ahbf. Values in brackets are the defaults.

    \b
    okdc compress
    okdc compress ./photos
    okdc compress /imagenet --model resnet18 --method ahbf
    okdc compress --recipe cifar100/resnet32-ahbf --data ./cifar100 --set train.epochs=60
    okdc compress --recipe cifar100/resnet32-ahbf --data ./cifar100 --experiment mine --resume auto
    """
    typed = {**flags.given(), "method": method, "method_kwargs": dict(method_kwargs)}
    if folder is not None:
        typed["data"] = _one_place(folder, typed.get("data"))
    if log_wandb:
        typed["log"] = [*typed.get("log", []), "wandb"]
    early.announce(typed.get("data") or recipe_name or resume or recipe.base(typed))
    refuse_address(resume, "--resume")
    preset = early.choose_preset(preset, recipe_name, typed, sets, resume)

    from okdc import methods, pipeline
    from okdc.pipeline import control, forecast, presets, run_folder
    from okdc.system.saying import logged
    from okdc.training import launch

    make = partial(recipe.resolve, sets=sets, flat=typed, method_settings=methods.settings)
    if preset is None:
        resolved = make(recipe_name or run_folder.recipe_of(resume))
    else:
        preset, resolved = presets.settle(preset, make, typed)
    several = resolved.train.devices * resolved.train.nodes > 1
    here = launch.place(resolved.train)
    if several and with_baseline:
        control.refuse_processes()
    if several and here is None:
        command = [sys.executable, "-m", "okdc", *sys.argv[1:], *(["--preset", preset] if preset else [])]
        raise SystemExit(launch.launch(command, resolved.train, rendezvous))
    controlled = with_baseline or (with_baseline is None and preset == recipe.FINETUNE and here is None)
    if resume is None and here is None:
        run_folder.choose(Path(output), resolved, experiment, resume)  # an error comes before the time is told
        forecast.announce(resolved, bool(controlled) and resolved.method["name"] != control.PLAIN)
    if controlled:
        control.train_control(resolved, output, experiment, resume)
    result = pipeline.compress(recipe=resolved, output=output, experiment=experiment, resume=resume)
    if here is not None and here[0] > 0:
        return  # the first of several processes speaks

    from okdc.cli import tables

    with logged(result.path / run_folder.LOG):
        show(tables.facts_of_result(result), lambda: tables.show_result(result))
    require_asked(result.verification, vars(resolved.export))


def _one_place(folder: str, named: str | None) -> str:
    """The data that stand alone on the command line, as timm's do; UsageError beside --data."""
    if named is not None:
        raise click.UsageError(f"the data are given twice: {folder} and --data {named}. Give one of them.")
    return folder


@main.command(cls=flags.GroupedCommand, short_help="Write the files that you deploy, and verify each.")
@click.argument("source", metavar="SOURCE", shell_complete=completion.complete_path)
@click.option("--output", metavar="DIR", help="Where the bundle is written; SOURCE/export if not given.")
@click.option("--model", metavar="NAME", help="The package.module:function that a run trained; it runs only if typed.")
@click.option(
    "--push-to-hub", metavar="USER/NAME", help="Put the bundle on the Hugging Face hub, if it is fit to ship."
)
@flags.settings("export", "data.data", "data.mean", "data.std", "data.interpolation", "data.crop_pct")
def export(source: str, output: str | None, push_to_hub: str | None, **_: Any) -> None:
    """Write SOURCE in deployable formats, and verify each against torch on the same images.

    SOURCE is a run folder, a saved student, or the name of a network.

    \b
    okdc export runs/NAME --int8 --fp16 --trt
    okdc export runs/NAME --onnx --data /imagenet --output deploy
    okdc export runs/NAME --triton --push-to-hub USER/NAME
    """
    from okdc import pipeline
    from okdc.cli import tables

    # `model` is among the settings, if it was typed
    verification = pipeline.export(source, output=output, push_to_hub=push_to_hub, **flags.given())
    places = [Path(output)] if output else [Path(source) / "export", Path(Path(source).name) / "export"]
    folder = next((place for place in places if (place / "predict.py").is_file()), None)
    command = tables.prediction(folder / "predict.py") if folder else None
    show(verification, lambda: tables.show_verification(verification, command, source))
    require_asked(verification, flags.given())


@main.command(cls=flags.GroupedCommand, short_help="Verify an exported bundle again, on this machine.")
@click.argument("bundle", metavar="BUNDLE|RUN", shell_complete=completion.complete_path)
@flags.settings(
    *("data.data", "data.val_split", "data.path_column", "data.label_column", "export.batch_sizes", "export.threads"),
    *("export.images", "export.max_drop", "export.min_agreement", "export.runtimes"),
)
def verify(bundle: str, **_: Any) -> None:
    """Check everything in a bundle again: accuracy, agreement with torch, latency on this machine.

    The command ends with exit code 3 if a file is not good enough to ship.

    \b
    okdc verify runs/NAME/export --data /imagenet
    okdc verify runs/NAME --val-split test
    okdc verify runs/NAME --runtimes openvino,opencv
    """
    from okdc import deploy, pipeline
    from okdc.cli import tables

    verification = pipeline.verify(bundle, **flags.given())
    show(verification, lambda: tables.show_verification(verification))
    if verification["verdict"] == "fail":
        raise GateError(deploy.failures(verification))
    require_asked(verification, flags.given())


def require_asked(verification: Verification | None, settings: Mapping[str, Any]) -> None:
    """Fail with exit code 2 when a file or a runtime was asked for that is not to be had here; all else is done."""
    from okdc import deploy

    on = [name for name, value in settings.items() if value is True]
    reason = None
    if verification:
        reason = deploy.not_written(verification, on) or deploy.not_run(verification, settings.get("runtimes") or [])
    if reason:
        raise ExportError(reason)
