"""compare: does it help?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from okdc.cli import completion, flags
from okdc.cli.group import main
from okdc.cli.output import show
from okdc.errors import TrainingError


@main.command(cls=flags.GroupedCommand, timm=True, short_help="See whether a method helps your network on your data.")
@flags.recipe_option("recipe")
@click.option(
    "--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="Change one setting of the recipe; repeatable."
)
@click.option(
    "--methods", type=flags.CommaList(click.STRING), default="one,dml,ahbf", show_default=True,
    help="The methods to compare, separated by commas, or all; FILE.py:CLASS names one of your own.",
    shell_complete=completion.several(completion.complete_method),
)  # fmt: skip
@click.option(
    "--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each, with seeds from --seed on."
)
@click.option("--tune", type=click.Choice(["lr"]), help="First find each method's learning rate, and plain training's.")
@click.option(
    "--equal-compute/--no-equal-compute", default=True,
    help="Also train the plain network for as much compute as each method takes.  [on]",
)  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at a time.")
@click.option(
    "--output", metavar="DIR", default="runs", show_default=True, help="Where the comparison's folder is made."
)
@click.option("--experiment", metavar="NAME", help="Name of that folder; compare-NETWORK-DATA if not given.")
@flags.settings("network", "cohort", "data", "train")
def compare(
    recipe: str | Path | None,
    sets: tuple[str, ...],
    methods: list[str],
    seeds: int,
    tune: str | None,
    equal_compute: bool,
    jobs: int,
    output: str,
    experiment: str | None,
    **_: Any,
) -> None:
    """See whether a method helps your network on your data, and whether plain training for longer helps as much.

    Each method is trained with several seeds. So is the plain network: for as many epochs, and for as much compute. The
    figures are those of the last epoch, or with --holdout of the epoch that training images set aside have picked: the
    validation images choose nothing. The same command goes on where it was stopped, and takes more methods and seeds.

    \b
    okdc compare --data digits --model resnet20_cifar --img-size 32 --epochs 5
    okdc compare --data DIR --model mobilenetv3_small_100 --pretrained --tune lr --methods one,ahbf --seeds 5
    """
    from okdc import comparing
    from okdc.cli import tables

    found = comparing.compare(
        methods=methods, seeds=seeds, recipe=recipe, sets=sets, output=output, experiment=experiment, jobs=jobs,
        tune=tune, equal_compute=equal_compute, **flags.given(),
    )  # fmt: skip
    show(tables.facts_of_comparison(found), lambda: tables.show_comparison(found))
    if not any(line.gain for line in found.lines):
        raise TrainingError(found.verdict)
