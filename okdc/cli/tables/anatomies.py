"""What networks are made of, what a method would build around one, and what came of many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from okdc import methods
from okdc.cli.tables import page
from okdc.errors import OkdcError, counted

if TYPE_CHECKING:
    from okdc.anatomy import Anatomy
    from okdc.anatomy.anatomy import Cut
    from okdc.cohort import Cost
    from okdc.measure.estimate import Estimate
    from okdc.recipe import Recipe


def facts_of_anatomy(model: str, anatomy: Anatomy, cut: str | None, refusal: str | None) -> dict[str, Any]:
    """What `show_anatomy` shows, as plain values; `used_by` are methods that part there if no cut is asked for."""
    found = {key: value for key, value in asdict(anatomy).items() if key not in ("name", "calls", "stages", "cuts")}
    cuts = [asdict(each) | {"used_by": used} for each, used in _cuts(anatomy, cut)]
    stages = [{key: value for key, value in asdict(each).items() if key != "end"} for each in anatomy.stages]
    chosen = {"default_cut": anatomy.cut(), "cut": cut or anatomy.cut(), "refused": refusal}
    return {"model": model, **found, "stages": stages, "cuts": cuts, **chosen}


def show_anatomy(model: str, anatomy: Anatomy, cut: str | None, refusal: str | None) -> None:
    """Stages and cuts of a network; `cut` or else the default is marked, and its tail's share of the cost given.

    `refusal` says why no branch can part there; None where one can.
    """
    console = page.console()
    console.print(
        f"[bold]{escape(model)}[/]: {anatomy.params:,} parameters, {anatomy.flops / 1e9:.3g} GFLOPs "
        f"for {page.shape(anatomy.input_size)}"
    )
    console.print(
        f"The classifier is {anatomy.classifier}, for {anatomy.num_classes} classes. It takes an embedding of "
        f"{anatomy.embedding} numbers. The last feature map is {page.shape(anatomy.feature_shape)} ({anatomy.layout}), "
        f"from {anatomy.feature_map}.",
        markup=False,
    )
    stages = page.table("stage", "ends with", "size", "blocks that can be repeated")
    for index, stage in enumerate(anatomy.stages, 1):
        stages.add_row(str(index), escape(stage.last), str(stage.size), escape(_blocks(stage.blocks)))
    console.print()
    console.print(stages)
    console.print()
    cuts = page.table("cut after", "shape", "FLOPs after", "params after", "used by")
    for each, used in _cuts(anatomy, cut):
        mark = "asked for" if cut == each.name else "default"
        mark = mark if each.name in (cut, anatomy.cut()) else ", ".join(used)
        cuts.add_row(
            escape(each.name), page.shape(each.shape), f"{each.flops_after:.0%}", f"{each.params_after:.0%}", mark
        )
    console.print(cuts)
    if refusal:
        console.print(f"\nNo branch can part after {cut or anatomy.cut()}: {refusal}", markup=False)
        return
    page.next_command(f"okdc compress --model {model} {f'--cut {cut} ' if cut else ''}--data DIR")


def _cuts(anatomy: Anatomy, cut: str | None) -> list[tuple[Cut, list[str]]]:
    """The cuts to choose from, that asked for and those of methods, early to late, with the methods that use them."""
    used = _cuts_of_methods(anatomy)
    shown = {*anatomy.choices(), *map(anatomy.find_cut, {cut or anatomy.cut(), *used})}
    return [(each, used.get(each.name, [])) for each in sorted(shown, key=lambda each: -each.flops_after)]


def _blocks(blocks: Iterable[tuple[str, ...]]) -> str:
    named = ["+".join(block) for block in blocks]
    return ", ".join(named) if len(named) < 4 else f"{named[0]} ... {named[-1]} ({len(named)})"


def _cuts_of_methods(anatomy: Anatomy) -> dict[str, list[str]]:
    """The methods by the cut that each of them takes if none is asked for."""
    used: dict[str, list[str]] = {}
    for name in methods.names():
        try:
            cuts = dict.fromkeys(branch.cut for branch in methods.get(name).plan(anatomy) if branch.cut)
        except OkdcError:  # a method that this network is not for says so where it is asked for
            continue
        for cut in cuts:
            used.setdefault(cut, []).append(name)
    return used


def facts_of_estimate(recipe: Recipe, found: Estimate) -> dict[str, Any]:
    """What `show_estimate` shows, as plain values; memory in bytes, for the recipe's batch."""
    batch = recipe.train.batch_size
    asked = {"model": recipe.network.model, "method": recipe.method["name"], "batch_size": batch}
    memory = found.fixed + batch * found.activations
    gradients = found.gradients._asdict() | {"ratio": found.gradients.ratio}
    return asked | asdict(found) | {"relative_flops": found.relative, "memory": memory, "gradients": gradients}


def show_estimate(recipe: Recipe, found: Estimate) -> None:
    """What a method would build around a network, and what training it takes: parameters, FLOPs, memory."""
    console, name, model = page.console(), recipe.method["name"], recipe.network.model
    console.print(
        f"[bold]{escape(name)}[/] around [bold]{escape(model)}[/], {page.shape(found.input_size)}, "
        f"{found.classes} classes: {counted(len(found.networks), 'network')}\n"
    )
    roles = page.table("", "")  # in a table of its own, with room for the names of modules
    table = page.table("", "parts after", "parameters", "its own", "MFLOPs/image")
    for column in table.columns[2:]:
        column.justify = "right"
    for index, each in enumerate(found.networks):
        roles.add_row(escape(each.name), escape(_role(index, each)))
        table.add_row(
            each.name, escape(each.cut or ""), f"{each.params:,}", f"{each.own_params:,}", _millions(each.flops)
        )
    rest = found.flops - sum(each.flops for each in found.networks)
    table.add_row(
        f"{escape(name)} itself", "", f"{found.own_params:,}", f"{found.own_params:,}", _millions(max(0, rest))
    )
    console.print(roles, "", table, sep="\n")
    if found.teacher_stands_in:
        console.print(f"\nNo teacher was given: a new {escape(model)} stands in for it. Give yours with --teacher.")
    batch = recipe.train.batch_size
    console.print(
        f"\n{found.trained_params:,} parameters learn, at {found.relative:.2f} times the FLOPs of the target alone "
        "(forward)."
    )
    console.print(
        f"In float32, training takes about {_bytes(found.fixed + batch * found.activations)} for a batch of {batch}: "
        f"{_bytes(found.fixed)} for weights, gradients and momentum, and {_bytes(found.activations)} for each image, "
        "which are kept for the backward pass. Mixed precision halves most of what is kept. What the libraries take "
        "for themselves comes on top."
    )
    console.print(
        f"At the start its losses give the target a gradient {found.gradients.ratio:.1f} times as large as plain "
        "training does (on noise)."
    )
    page.next_command(f"okdc methods {name}")


def _role(index: int, each: Cost) -> str:
    if index == 0:
        return "the target, ships"
    if each.frozen:
        return f"{each.grown}, not trained"
    if each.cut is None:
        return f"peer network{': ' * bool(each.grown)}{each.grown}"
    return each.grown or "the same tail again"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def _bytes(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def show_row(row: dict[str, Any]) -> None:
    """One line about one network of a sweep, as soon as it is done."""
    colour = {"ok": "green", "partly": "yellow"}.get(row["outcome"], "red")
    what = row.get("reason") or f"after {row['cut']}, {row['tail_flops']:.0%} of the FLOPs; {row['grown']}"
    page.console().print(
        f"[{colour}]{row['outcome']:8}[/] {escape(row['network'])}  {row['seconds']} s  {escape(what)}", soft_wrap=True
    )


def show_sweep(rows: list[dict[str, str]], summary: list[tuple[str, int]], path: str) -> None:
    """How many networks of a sweep there are of each outcome, those that are not ok by name, and where the table is."""
    counts = page.table("", "")
    for label, count in summary:
        counts.add_row(label, str(count))
    console = page.console()
    console.print("\n", counts, sep="")
    failures = page.table("network", "outcome", "reason")
    for row in rows:
        if row["outcome"] != "ok":
            failures.add_row(row["network"], row["outcome"], escape(row["reason"]))
    if failures.row_count:
        console.print("\n", failures, sep="")
    console.print(f"\nThe table is {path}; {Path(path).with_suffix('.md')} says it in words.", markup=False)
