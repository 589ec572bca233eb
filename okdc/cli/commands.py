"""The command line: each command reads its options, calls one function of the package, and prints what came of it."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from okdc import __version__, recipe
from okdc.cli import flags
from okdc.errors import ExportError, GateError, OkdcError, RecipeError

if TYPE_CHECKING:
    from okdc.verification.schema import Verification


class _Failure(click.ClickException):
    """An OkdcError as click shows it: one paragraph on stderr, no traceback."""

    def __init__(self, error: OkdcError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        width = max(40, shutil.get_terminal_size().columns - 1)
        who = f" on rank {os.environ['RANK']}" if os.environ.get("RANK", "0") != "0" else ""
        for line in f"okdc: error{who}: {self.message}".splitlines():
            hang = " " * (len(line) - len(line.lstrip()) + 2)
            click.echo(
                textwrap.fill(line, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False),
                err=True,
            )


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OkdcError as error:
            if getattr(error, "verification", None):
                from okdc.cli import tables

                tables.show_verification(error.verification)  # type: ignore[attr-defined]
            raise _Failure(error) from error
        except KeyboardInterrupt:
            click.echo("\nokdc: interrupted.", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which they are used


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", message="okdc %(version)s")
def main() -> None:
    """Make a vision network more accurate without making it bigger, then export it, verified.

    okdc trains your network together with branches that teach it, throws the branches away, and ships the same network.

    \b
    okdc compress                                             try it: real digits, any machine, about a minute
    okdc compress --model resnet18 --method ahbf --data DIR   your images, in DIR/train and DIR/val
    okdc export runs/NAME --onnx --trt                        write and verify what you deploy
    """


@main.command(cls=flags.GroupedCommand, short_help="Train a network with others, keep it alone, export it.")
@click.option("--recipe", "-c", "--config", "recipe_name", metavar="NAME|FILE", help="Start from this recipe.")
@click.option(
    "--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one setting of the recipe; repeatable."
)
@click.option("--method", metavar="NAME", help="How the members teach each other (okdc methods lists them).")
@click.option("--method-kwargs", type=flags.KeyValue(), multiple=True, help="A setting of the method; repeatable.")
@click.option("--output", metavar="DIR", default="runs", show_default=True, help="Where run folders are made.")
@click.option("--experiment", metavar="NAME", help="Name of the run folder; NETWORK-METHOD-DATA if not given.")
@click.option("--resume", metavar="auto|PATH", help="Go on from the run's last state (auto), or from this run or file.")
@click.option("--rendezvous", metavar="HOST:PORT", help="With --nodes: a free port of the first one; alike on all.")
@flags.settings("network", "cohort", "data", "train", "export")
def compress(
    recipe_name: str | Path | None,
    sets: tuple[str, ...],
    method: str | None,
    method_kwargs: tuple[tuple[str, Any], ...],
    output: str,
    experiment: str | None,
    resume: str | None,
    rendezvous: str | None,
    **_: Any,
) -> None:
    """Train a network together with others, keep it alone, export and verify it.

    The command line wins over --set, which wins over the recipe. With neither a recipe nor data, a small real data set
    (digits/resnet18-ahbf) is used. The values in brackets are those of a recipe that leaves a setting out.

    \b
    okdc compress
    okdc compress --model resnet18 --method ahbf --data /imagenet
    okdc compress --recipe cifar100/resnet32-ahbf --data ./cifar100 --set train.epochs=60
    okdc compress --recipe cifar100/resnet32-ahbf --data ./cifar100 --experiment mine --resume auto
    """
    typed = {**flags.given(), "method": method, "method_kwargs": dict(method_kwargs)}

    from okdc import methods, pipeline
    from okdc.pipeline import run_folder
    from okdc.training import launch

    recipe_name = recipe_name or run_folder.recipe_of(resume)
    resolved = recipe.resolve(recipe_name, sets=sets, flat=typed, method_settings=methods.settings)
    if resolved.train.devices * resolved.train.nodes > 1 and launch.place(resolved.train) is None:
        command = [sys.executable, "-m", "okdc", *sys.argv[1:]]
        raise SystemExit(launch.launch(command, resolved.train, rendezvous))
    result = pipeline.compress(recipe=resolved, output=output, experiment=experiment, resume=resume)
    here = launch.place(resolved.train)
    if here is not None and here[0] > 0:
        return  # the first of several processes speaks

    from okdc.cli import tables

    tables.show_result(result)
    _require_asked(result.verification, vars(resolved.export))


@main.command(cls=flags.GroupedCommand, short_help="Write and verify what you deploy.")
@click.argument("source", metavar="SOURCE")
@click.option("--output", metavar="DIR", help="Where the bundle is written; SOURCE/export if not given.")
@click.option("--model", metavar="NAME", help="The package.module:function that a run trained; it runs only if typed.")
@click.option(
    "--push-to-hub", metavar="USER/NAME", help="Put the bundle on the Hugging Face hub, if it is fit to ship."
)
@flags.settings("export", "data.data")
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
    tables.show_verification(verification, f"python {folder / 'predict.py'} IMAGE" if folder else None)
    _require_asked(verification, flags.given())


@main.command(cls=flags.GroupedCommand, short_help="Check an exported bundle on this machine.")
@click.argument("bundle", metavar="BUNDLE|RUN")
@flags.settings(
    "data.data", "export.batch_sizes", "export.threads", "export.images", "export.max_drop", "export.min_agreement"
)
def verify(bundle: str, **_: Any) -> None:
    """Check everything in a bundle again: accuracy, agreement with torch, latency on this machine.

    Exit code 3 when a file is not good enough to ship.

    \b
    okdc verify runs/NAME/export --data /imagenet
    """
    from okdc import deploy, pipeline
    from okdc.cli import tables

    verification = pipeline.verify(Path(bundle), **flags.given())
    tables.show_verification(verification)
    if verification["verdict"] == "fail":
        raise GateError(deploy.failures(verification))


@main.command(cls=flags.GroupedCommand, short_help="Time every format of a network in one fair table.")
@click.argument("source", metavar="BUNDLE|RUN|NAME")
@click.option(
    "--output", metavar="FILE", multiple=True, help="Also write the table to FILE.md, .csv or .json; repeatable."
)
@click.option("--compile/--no-compile", "compiled", default=True, help="Time torch.compile too, a minute more.  [on]")
@flags.settings("export.batch_sizes", "export.threads", "export.images", "data.data", "train.device")
@flags.settings("network.img_size", "network.in_chans", "network.num_classes", "network.model_kwargs")
def benchmark(source: str, output: tuple[str, ...], compiled: bool, **_: Any) -> None:
    """Time every format of a network on this machine: torch eager and compiled, onnxruntime, TensorRT.

    A bundle, or a run's bundle, is verified first, so that the table says what is fit to ship and how accurate it is. A
    NAME is built with random weights and exported to a temporary folder, int8 calibrated on noise: for speed alone.

    \b
    okdc benchmark runs/NAME --batch-sizes 1,8,32 --output speed.md
    okdc benchmark resnet18 --threads 2 --no-compile
    """
    from okdc.cli import tables
    from okdc.measure import benchmark as benchmarks

    paths = [Path(each) for each in output]
    benchmarks.check_output(paths)
    report = benchmarks.benchmark(source, compiled=compiled, **flags.given())
    for path in paths:
        benchmarks.write(report, path)
    tables.show_benchmark(report)


@main.command(cls=flags.GroupedCommand, short_help="Show what a network is made of, and what a method would build.")
@click.argument("model", metavar="MODEL", required=False)
@click.option("--method", metavar="NAME", help="Show what this method would build around it, and what that takes.")
@click.option("--method-kwargs", type=flags.KeyValue(), multiple=True, help="A setting of the method; repeatable.")
@flags.settings("network.img_size", "network.in_chans", "network.small_input")
@flags.settings("network.num_classes", "network.model_kwargs", "cohort")
@flags.settings("train.batch_size")
@click.option(
    "--all", "everything", is_flag=True, help="Examine every network by name: see what okdc can do with each."
)
@click.option("--families", is_flag=True, help="With --all: only the smallest network of each of timm's families.")
@click.option("--sample", type=click.IntRange(1), help="With --all: only so many others of timm's, always the same.")
@click.option("--filter", "pattern", metavar="PATTERN", help="With --all: only names that match, such as 'resnet*'.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="With --all: networks at a time.")
@click.option(
    "--output", metavar="FILE", default="zoo.csv", show_default=True, help="With --all: the table; it goes on."
)
@click.option("--limit-seconds", type=float, default=600.0, show_default=True, help="With --all: of one network.")
@click.option("--limit-gb", type=float, default=12.0, show_default=True, help="With --all: memory of one network.")
@click.option("--compile", "compiles", is_flag=True, help="With --all: also count the graph breaks of torch.compile.")
@click.option("--onnx", is_flag=True, help="With --all: also export to ONNX and compare the logits.")
def inspect(
    model: str | None,
    method: str | None,
    method_kwargs: tuple[tuple[str, Any], ...],
    everything: bool,
    **options: Any,
) -> None:
    """Show what a network is made of: its stages, and where branches can part from it.

    With --method: the members that this method would build around it, their parameters and FLOPs, and an estimate of
    the memory that training takes. Nothing is trained and no data is read.

    With --all: share, grow, narrow, train a step of and strip many networks, each in a process of its own, into a csv
    file, with what came of them in words beside it (.md). Started again, it goes on: a network with a row is skipped,
    unless it crashed, was stopped by a limit that is higher now, or lacks a column that is asked for now.

    \b
    okdc inspect resnet18
    okdc inspect torchvision/shufflenet_v2_x1_0 --img-size 64
    okdc inspect resnet32_cifar --method ahbf --members 3 --num-classes 100
    okdc inspect --all --families --img-size 64 --output families.csv
    okdc inspect --all --sample 200 --img-size 64 --output sample.csv
    """
    if everything == bool(model):
        raise click.UsageError("expected the name of one network, or --all.")
    if options["families"] and options["sample"]:
        raise click.UsageError("--families and --sample are two sets of names: give one of them.")
    _refuse_ignored(model)
    if everything:
        _examine_all(**options)
        return
    assert model is not None
    from okdc import anatomy, methods, networks
    from okdc.cli import tables
    from okdc.measure import estimate

    typed = flags.given() | {"model": model}
    if method:
        typed |= {"method": method, "method_kwargs": dict(method_kwargs)}
        asked = recipe.override(recipe.Recipe(), typed, methods.settings, source="command line")
        tables.show_estimate(asked, estimate.estimate(asked))
        return
    settings = ("model", "img_size", "in_chans", "small_input", "num_classes", "model_kwargs", "cut")
    if method_kwargs or typed.keys() - set(settings):
        raise RecipeError("these settings say what a method builds: add --method NAME (okdc methods lists them).")
    cut = typed.pop("cut", None)
    network_settings = recipe.override(recipe.Recipe(), typed).network
    network = networks.load(network_settings)
    input_size = networks.data_config(network, network_settings)["input_size"]
    networks.check_input(network, input_size)
    found = anatomy.inspect(network, input_size)
    tables.show_anatomy(model, found, cut, lambda place: estimate.refusal(network, input_size, place))


def _refuse_ignored(model: str | None) -> None:
    """UsageError for options of --all beside the name `model`, and for those of one network beside --all."""
    context = click.get_current_context()
    sweep = ("families", "sample", "pattern", "jobs", "output", "limit_seconds", "limit_gb", "compiles", "onnx")
    wrong = {
        param.name: param.opts[0]
        for param in context.command.params
        if param.name not in ("model", "everything", "img_size") and (param.name in sweep) == bool(model)
        if context.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE
    }
    words = " ".join(wrong.values())
    if wrong and model:
        names = "" if wrong.keys() & {"families", "sample", "pattern"} else f"--filter {model} "
        raise click.UsageError(f"{words}: only for many networks. Type: okdc inspect --all {names}{words} ...")
    if wrong:
        raise click.UsageError(f"{words}: only for one network. Type: okdc inspect NAME {words} ...")


def _examine_all(
    families: bool,
    sample: int | None,
    pattern: str | None,
    jobs: int,
    output: str,
    limit_seconds: float,
    limit_gb: float,
    img_size: int | None,
    compiles: bool,
    onnx: bool,
    **_: Any,
) -> None:
    """Examine many networks and say what came of it; what the csv file has already is not done again."""
    from okdc.cli import tables
    from okdc.measure import zoo

    names = zoo.choose(pattern, families, sample)
    limits = zoo.Limits(limit_seconds, limit_gb)
    rows = zoo.sweep(
        names,
        Path(output),
        jobs=jobs,
        limits=limits,
        done=tables.show_row,
        img_size=img_size,
        compiles=compiles,
        onnx=onnx,
    )
    tables.show_sweep(rows, zoo.summary(rows), output)


def _require_asked(verification: Verification | None, settings: Mapping[str, Any]) -> None:
    """Fail with exit code 2 when a file was asked for that cannot be written here; everything else is written."""
    from okdc import deploy

    on = [name for name, value in settings.items() if value is True]
    reason = deploy.not_written(verification, on) if verification else None
    if reason:
        raise ExportError(reason)


@main.command(cls=flags.GroupedCommand, short_help="Measure what a training step costs beside the plain target's.")
@click.option("--recipe", "-c", "--config", "recipe_name", metavar="NAME|FILE", help="Start from this recipe.")
@click.option("--method", metavar="NAME", help="How the members teach each other (okdc methods lists them).")
@click.option("--method-kwargs", type=flags.KeyValue(), multiple=True, help="A setting of the method; repeatable.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="How often each is measured.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@flags.settings("network", "cohort", "data", "train.batch_size", "train.device", "train.opt", "train.torchcompile")
@flags.settings("train.torchcompile_mode", "train.amp", "train.amp_dtype", "train.channels_last")
def profile(
    recipe_name: str | None,
    method: str | None,
    method_kwargs: tuple[tuple[str, Any], ...],
    rounds: int,
    as_json: bool,
    **_: Any,
) -> None:
    """Measure what a training step costs beside the plain target's, in one run, in turn and repeatedly.

    In full and mixed precision, in both memory layouts, and with --torchcompile compiled. With --data: how fast the
    images come as well, and what share of its time training waits for them.

    \b
    okdc profile --model resnet18 --method ahbf --batch-size 8
    okdc profile --recipe cifar100/resnet32-ahbf --data ./cifar100 --json
    """
    typed = {**flags.given(), "method": method, "method_kwargs": dict(method_kwargs)}

    from okdc import methods
    from okdc.cli import tables
    from okdc.measure import step_cost

    start = recipe.load(recipe_name) if recipe_name else recipe.Recipe()
    asked = recipe.override(start, typed, methods.settings, source="command line")
    found = step_cost.profile(asked, rounds=rounds, with_data="data" in typed)
    tables.show_profile(found, as_json)


@main.command(short_help="List the methods, or show the card of one.")
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the methods, or show the card of one.

    \b
    okdc methods
    okdc methods ahbf
    """
    from okdc import methods as known
    from okdc.cli import tables

    if name:
        click.echo(known.card(name).strip())
        click.echo(f"\n{tables.settings_of(name)}")
    else:
        tables.show_methods()


@main.command()
@click.argument("words", nargs=-1, metavar="[NAME | copy NAME DIR]")
def recipes(words: tuple[str, ...]) -> None:
    """List the recipes, print one, or copy one to change it.

    \b
    okdc recipes
    okdc recipes cifar100/resnet32-ahbf
    okdc recipes copy cifar100/resnet32-ahbf .
    """
    if not words:
        width = max(map(len, recipe.names()), default=0)
        for name in recipe.names():
            click.echo(f"{name:{width}}  {_first_line(recipe.path(name).read_text(encoding='utf-8'))}")
    elif words[0] == "copy" and len(words) in (2, 3):
        click.echo(f"wrote {_copy(words[1], Path(words[2] if words[2:] else '.'))}")
    elif len(words) == 1:
        click.echo(recipe.path(words[0]).read_text(encoding="utf-8").rstrip())
    else:
        raise click.UsageError("expected no argument, NAME, or copy NAME DIR")


def _copy(name: str, folder: Path) -> Path:
    source = recipe.path(name)
    target = folder / source.name
    if target.exists():
        raise RecipeError(f"{target} is there already: give another folder, or move it away.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def _first_line(text: str) -> str:
    return next((line.lstrip("# ").strip() for line in text.splitlines() if line.strip("# ")), "")
