"""benchmark, inspect, profile: what networks, files and steps are and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from okdc import recipe
from okdc.cli import completion, flags
from okdc.cli.group import main
from okdc.cli.output import show
from okdc.errors import RecipeError
from okdc.system import saying


@main.command(cls=flags.GroupedCommand, short_help="Time every format of a network, in one fair table.")
@click.argument("source", metavar="BUNDLE|RUN|NAME", shell_complete=completion.or_path(completion.complete_model))
@click.option(
    "--output", metavar="FILE", multiple=True, help="Also write the table to FILE.md, .csv or .json; repeatable."
)
@click.option("--compile/--no-compile", "compiled", default=True, help="Time torch.compile too, a minute more.  [on]")
@flags.settings("export.batch_sizes", "export.threads", "export.images", "export.runtimes", "data.data", "train.device")
@flags.settings("network.img_size", "network.in_chans", "network.num_classes", "network.model_kwargs")
def benchmark(source: str, output: tuple[str, ...], compiled: bool, **_: Any) -> None:
    """Time every format of a network on this machine: torch eager and compiled, onnxruntime, TensorRT.

    A bundle, or a run's bundle, is verified first, so that the table says what is fit to ship and how accurate it is. A
    NAME is built with random weights and exported to a temporary folder, int8 calibrated on noise: for speed alone.

    \b
    okdc benchmark runs/NAME --batch-sizes 1,8,32 --output speed.md
    okdc benchmark resnet18 --threads 2 --no-compile
    okdc benchmark resnet18 --runtimes openvino
    """
    from okdc.cli import tables
    from okdc.measure import benchmark as benchmarks

    paths = [Path(each) for each in output]
    benchmarks.check_output(paths)
    report = benchmarks.benchmark(source, compiled=compiled, **flags.given())
    for path in paths:
        benchmarks.write(report, path)
    show(report, lambda: tables.show_benchmark(report))


@main.command(cls=flags.GroupedCommand, short_help="Show the parts of a network, and what a method would build.")
@click.argument("model", metavar="MODEL", required=False, shell_complete=completion.complete_model)
@click.option(
    "--method",
    metavar="NAME",
    help="Show what this method would build around it, and what that takes.",
    shell_complete=completion.complete_method,
)
@click.option("--method-kwargs", type=flags.KeyValue(), multiple=True, help="A setting of the method; repeatable.")
@flags.settings("network.img_size", "network.in_chans", "network.small_input", "network.task", "network.head")
@flags.settings("network.head_width", "network.num_classes", "network.model_kwargs", "cohort")
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
    from okdc import anatomy, methods, networks, tasks
    from okdc.cli import tables
    from okdc.measure import estimate

    typed = flags.given() | {"model": model}
    if method:
        typed |= {"method": method, "method_kwargs": dict(method_kwargs)}
        asked = recipe.override(recipe.Recipe(), typed, methods.settings, source="command line")
        built = estimate.estimate(asked)
        show(tables.facts_of_estimate(asked, built), lambda: tables.show_estimate(asked, built))
        return
    settings = {*vars(recipe.NetworkSettings()), "cut"}
    if method_kwargs or typed.keys() - settings:
        raise RecipeError("these settings say what a method builds: add --method NAME (okdc methods lists them).")
    cut = typed.pop("cut", None)
    network_settings = recipe.override(recipe.Recipe(), typed).network
    network = networks.load(network_settings)
    input_size = networks.data_config(network, network_settings)["input_size"]
    task = tasks.get(network_settings.task)
    networks.check_input(network, input_size, task)
    found = anatomy.inspect(network, input_size, task=task)
    refusal = estimate.refusal(network, found, found.find_cut(cut).name if cut else found.cut(), task)
    show(tables.facts_of_anatomy(model, found, cut, refusal), lambda: tables.show_anatomy(model, found, cut, refusal))


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
    limits = zoo.Budget(limit_seconds, limit_gb)
    rows = zoo.sweep(
        names,
        Path(output),
        jobs=jobs,
        limits=limits,
        done=lambda row: None if saying.quiet else tables.show_row(row),
        img_size=img_size,
        compiles=compiles,
        onnx=onnx,
    )
    told = {"table": output, "summary": dict(zoo.summary(rows)), "networks": rows}
    show(told, lambda: tables.show_sweep(rows, zoo.summary(rows), output))


@main.command(cls=flags.GroupedCommand, short_help="Measure what a training step costs, beside plain training.")
@flags.recipe_option("recipe_name")
@click.option(
    "--method",
    metavar="NAME",
    help="How the members teach each other (okdc methods lists them).",
    shell_complete=completion.complete_method,
)
@click.option("--method-kwargs", type=flags.KeyValue(), multiple=True, help="A setting of the method; repeatable.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="How often each is measured.")
@flags.settings("network", "cohort", "data", "train.batch_size", "train.device", "train.opt", "train.torchcompile")
@flags.settings("train.torchcompile_mode", "train.amp", "train.amp_dtype", "train.channels_last")
def profile(
    recipe_name: str | None,
    method: str | None,
    method_kwargs: tuple[tuple[str, Any], ...],
    rounds: int,
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
    show(found.to_dict(), lambda: tables.show_profile(found))
