"""How fast each format of a network is: one table of torch, onnxruntime and TensorRT on one machine.

Every latency comes from a process of its own, warmed up, with CPU time beside wall time; accuracy and fitness come from
verifying the same files.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from okdc import deploy, networks, pipeline, tasks
from okdc.data import wrap
from okdc.deploy import bundle, runtimes, targets, torch_runner
from okdc.errors import ExportError, RecipeError
from okdc.networks.saved import config_of
from okdc.recipe import ExportSettings, Recipe, override
from okdc.system.saying import say
from okdc.system.wording import without_paths
from okdc.training.machine import choose_device
from okdc.verification.alone import measure_alone
from okdc.verification.schema import Row, Verification

_CALIBRATION = 16  # images
_BUILDING = ("img_size", "in_chans", "num_classes", "model_kwargs")  # settings of a network that is built here


def benchmark(source: str | Path, *, device: str = "auto", compiled: bool = True, **settings: Any) -> dict[str, Any]:
    """Time every format of a bundle, of a run's bundle, or of a network by name; returns the report.

    A name is built with random weights and written to every format in a temporary folder, int8 calibrated on noise and
    no layer kept in float, of which a trained network may need some; its accuracy says nothing and is left out.
    device: auto, cpu, cuda or cuda:1. compiled: with torch.compile, which takes a minute. settings: batch_sizes,
    threads, images and data of a bundle; img_size, in_chans, num_classes, model_kwargs of a name.
    """
    where = str(choose_device(device))
    with tempfile.TemporaryDirectory() as scratch:
        reasons: dict[str, str] = {}
        folder = _find(Path(source))
        building = {key: settings.pop(key) for key in _BUILDING if key in settings}
        if folder is not None and building:
            raise RecipeError(
                f"{source} is trained already, so --{next(iter(building)).replace('_', '-')} is of no use."
            )
        if folder is None:
            if "data" in settings:
                raise RecipeError(f"{source} is a name, built with random weights: leave --data out.")
            folder, reasons = _write(override(Recipe(), {"model": str(source), **building}), Path(scratch))
            settings |= {"max_drop": 100.0, "min_agreement": 0.0}  # random weights agree on little
        verification = pipeline.verify(folder, device=where, **settings)
        export = override(Recipe(), settings).export
        rows = _torch(folder, verification, export, compiled)
        untimed = {"torch", "predict.py", *(target.row for target in targets.known().values() if target.raw)}
        rows += [
            _row(each, tasks.of(verification).metric) for each in verification["rows"] if each["name"] not in untimed
        ]
        absent = _missing(folder) | reasons | _skipped(verification)
        rows += [_absent(name, reason, tasks.of(verification).metric) for name, reason in absent.items()]
    facts = {key: verification[key] for key in ("device", "threads", "images", "environment")}
    facts |= {"task": verification["task"]} if "task" in verification else {}
    return {"schema_version": 1, "source": without_paths(str(source)), **facts, "rows": rows}


def check_output(paths: Sequence[Path]) -> None:
    """Raise RecipeError for a file that `write` would not know how to write; asked before anything is measured."""
    for path in paths:
        if path.suffix not in (".md", ".csv", ".json"):
            raise RecipeError(f"--output {path}: give a file that ends in .md, .csv or .json.")


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report as Markdown, csv or json, as the file's name ends."""
    check_output([path])
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {".md": _markdown, ".csv": _csv, ".json": lambda each: json.dumps(each, indent=2, sort_keys=True) + "\n"}
    path.write_text(texts[path.suffix](report), encoding="utf-8")


def columns(report: dict[str, Any]) -> tuple[str, ...]:
    """What stands above the `lines`."""
    word = tasks.of(report).word
    return "format", "status", "MB", f"{word} %", "batch", "ms p50", "ms p95", "CPU ms", "images/s", "busy"


def lines(report: dict[str, Any]) -> list[list[str]]:
    """The report as cells under `columns`: a line for every format and batch size."""
    table, metric = [], tasks.of(report).metric
    for row in report["rows"]:
        head = [row["format"], row["status"], _number(row["mb"], ".1f"), _number(row[metric], ".2f")]
        for each in row["latency"] or [{}]:
            busy = {True: "yes", False: "no"}.get(each.get("contended"), "")
            times = [_number(each.get(key), ".2f") for key in ("p50_ms", "p95_ms", "cpu_ms")]
            table.append(
                [*head, _number(each.get("batch"), "d"), *times, _number(each.get("images_per_second"), ".0f"), busy]
            )
    return table


def title(report: dict[str, Any]) -> str:
    """What was measured, where and how, in one sentence."""
    environment, threads = report["environment"], report["threads"]
    machine = environment["gpu"] if report["device"] != "cpu" else environment["cpu"]
    return f"{report['source']} on {machine}, {threads} CPU thread{'s' * (threads > 1)}, a process for each format."


def _find(path: Path) -> Path | None:
    """The bundle at `path` or of the run there; None for what is not a path."""
    for folder in (path, path / "export"):
        if config_of(folder) is not None:
            return folder
    if path.exists():
        raise ExportError(f"{path} holds no exported bundle. Write one first: okdc export {path} --onnx")
    return None


def _write(recipe: Recipe, scratch: Path) -> tuple[Path, dict[str, str]]:
    """The bundle of an untrained network in every format, and why some are not in it."""
    name, folder = recipe.network.model, scratch / "export"
    network = networks.load(recipe.network, typed=[name])
    config = networks.data_config(network, recipe.network)
    formats = {setting: True for each in targets.known().values() if not each.raw for setting in each.asked_by}
    lenient = {"batch_sizes": [], "max_drop": 100.0, "min_agreement": 0.0}
    settings = override(recipe, {**formats, **lenient}).export
    classes = networks.check_input(network, config["input_size"]).shape[1]
    noise = torch.randn(_CALIBRATION, *config["input_size"], generator=torch.Generator().manual_seed(0))
    data = wrap([(noise, torch.arange(_CALIBRATION) % classes)], num_classes=classes, preprocess=config, name="noise")
    try:
        verification = deploy.export_bundle(
            network, data, settings, folder, arch=name, model_args=networks.arguments(recipe.network)
        )
    except deploy.UnfitError as error:
        verification, folder = error.verification, deploy.failed_folder(folder)
    missing = (row for row in verification["rows"] if row["file"] and not (folder / row["file"]).exists())
    return folder, _skipped(verification) | {row["name"]: str(row["reason"]) for row in missing}


def _torch(folder: Path, verification: Verification, settings: ExportSettings, compiled: bool) -> list[dict[str, Any]]:
    """The rows of torch, eager and compiled."""
    found, metric = [row for row in verification["rows"] if row["name"] == "torch"], tasks.of(verification).metric
    if not found:
        return [_absent("torch eager", "neither timm nor torchvision can build this network from the bundle", metric)]
    eager = _row(found[0], metric) | {"format": "torch eager"}
    if not compiled:
        return [eager]
    sizes, threads = settings.batch_sizes, verification["threads"]
    shape = max(sizes, default=1), *deploy.read(folder)["preprocess"]["input_size"]
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    say("timing torch, compiled; this takes a minute")
    try:
        timed = measure_alone(
            torch_runner.__name__, folder, verification["device"], images, sizes, threads, {"compiled": True}
        )
    except RuntimeError as error:
        return [eager, _absent("torch compiled", without_paths(str(error)), metric)]
    return [eager, eager | {"format": "torch compiled", "latency": timed}]


def _skipped(verification: Verification) -> dict[str, str]:
    """The rows that a verification would have if their formats were available here, and why they are not."""
    known = targets.known()
    rows = {each: target.row for name, target in known.items() for each in (name, target.row)}
    rows |= {target.on(device): target.on(device) for target in known.values() for device in target.devices}
    rows |= {name: name for name in runtimes.known()}
    return {rows[each["target"]]: each["reason"] for each in verification["skipped"] if each["target"] in rows}


def _missing(folder: Path) -> dict[str, str]:
    """The formats that are not in a bundle, and why, or how to get them."""
    known, missing = targets.known().values(), dict[str, str]()
    if not torch.cuda.is_available():
        missing = {each.on(device): "torch sees no CUDA device here" for each in known for device in each.devices}
    exported: list[Row] = bundle.read_json(folder / "verification.json")["rows"]
    failed = {row["name"]: f"not in the bundle: {row['reason']}" for row in exported if not row["pass"]}
    # An export replaces the bundle, so what is in it is asked for again.
    there = [setting for target in known if (folder / target.file).exists() for setting in target.asked_by]
    for target in known:
        if target.raw:
            missing[target.row] = "it takes images of any size, on which its time depends: it is not timed"
        elif not (folder / target.file).exists():
            settings = dict.fromkeys([*there, *target.asked_by])
            typed = " ".join(f"--{setting.replace('_', '-')}" for setting in settings)
            reason = target.module.available() or failed.get(target.row)
            missing[target.row] = reason or f"not in the bundle: okdc export RUN {typed}"
    return {name: without_paths(reason) for name, reason in missing.items()}


def _row(row: Row, metric: str) -> dict[str, Any]:
    status = "; ".join(filter(None, ["ok", row["reason"]])) if row["pass"] else f"not fit: {row['reason']}"
    measured = {"file": row["file"], "mb": row["mb"], metric: dict(row).get(metric), "provider": row["provider"]}
    return {"format": row["name"], "status": status, **measured, "latency": row["latency"]}


def _absent(name: str, reason: str, metric: str) -> dict[str, Any]:
    nothing: dict[str, Any] = dict.fromkeys(("file", "mb", metric, "provider"))
    return {"format": name, "status": f"unavailable: {reason}", **nothing, "latency": []}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _markdown(report: dict[str, Any]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    table = [line(columns(report)), line(["---"] * len(columns(report))), *map(line, lines(report))]
    return "\n".join([*table, "", title(report), ""])


def _csv(report: dict[str, Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns(report), *lines(report)])
    return text.getvalue()
