"""Sweeping networks by name: each is examined in a process of its own, under limits, and becomes one row of a table."""

from __future__ import annotations

import csv
import fnmatch
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch

from okdc import networks
from okdc.errors import NetworkError, RunError, nearest
from okdc.measure import trial

SEED = 0  # of the sample


@dataclass(frozen=True)
class Budget:
    """What one network may take: seconds, and gigabytes of memory (watched where the system has /proc)."""

    seconds: float = 600.0
    gigabytes: float = 12.0


@dataclass
class _Job:
    name: str
    process: Any
    answer: Connection
    started: float


def choose(pattern: str | None = None, families: bool = False, sample: int | None = None) -> list[str]:
    """Every network by name, or those matching `pattern` (as file names match), or each timm family's smallest.

    `sample` draws so many of timm's other names, always the same. NetworkError when nothing matches.
    """
    known = smallest_of_families() if families else networks.names()
    if sample is not None:
        others = set(timm.list_models()) - set(timm.list_models(module="cifar")) - set(smallest_of_families())
        shuffled = sorted(others)
        random.Random(SEED).shuffle(shuffled)
        known = shuffled[:sample]
    if pattern is None:
        return known
    found = [name for name in known if fnmatch.fnmatch(name, pattern)]
    if not found:
        raise NetworkError(f"no network matches {pattern!r}.{nearest(pattern, known)} Patterns are like 'resnet*'.")
    return found


def smallest_of_families() -> list[str]:
    """The network of fewest parameters of each of timm's model families, measured without making any weights."""
    smallest = []
    for family in _families():
        names = timm.list_models(module=family)
        known = [name for name in names if name in _SMALLEST]
        smallest.append(known[0] if known else min(names, key=_size))
    return smallest


def _families() -> list[str]:
    return [module for module in timm.models.list_modules() if module != "cifar"]  # which okdc registers


def _size(name: str) -> float:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())
    except Exception:  # it looks at its weights while it is made
        return float("inf")


def sweep(
    names: Sequence[str],
    output: Path,
    *,
    jobs: int = 1,
    limits: Budget = Budget(),
    done: Callable[[dict[str, Any]], None] = lambda row: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """The rows of `names`, in their order, also in the csv file `output`; networks that have a row there are skipped.

    Unless it crashed, was stopped by a lower limit, or lacks a column that is asked for now. `options` are those of
    `trial.examine`; `done` is told of every new row. What came of all is also written in words beside the csv, as
    .md. RunError for a csv of something else, or of another image size.
    """
    rows: dict[str, dict[str, Any]] = {row["network"]: row for row in read(output)}
    asked = str(options.get("img_size") or "")
    for other in {row["img_size"] for row in rows.values()} - {asked}:
        its, ours = (f"--img-size {size}" if size else "no --img-size" for size in (other, asked))
        raise RunError(f"{output} was made with {its}, this sweep has {ours}: give another --output.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["okdc.measure.trial"])  # every network's process starts with the imports done
    waiting = [name for name in names if name not in rows or _is_open(rows[name], limits, options)]
    running: list[_Job] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop(0), limits, options))
            for job in list(running):
                row = _result(job, limits)
                if row is not None:
                    running.remove(job)
                    rows[job.name] = row | {"img_size": asked}
                    _write(output, [rows[job.name]], "a")
                    done(row)
            time.sleep(0.2)
    finally:
        for job in running:
            job.process.kill()
    whole = output.with_name(f".{output.name}.tmp")
    _write(whole, rows.values(), "w")
    whole.replace(output)  # without the rows that were made again
    table = [{column: str(rows[name].get(column, "")) for column in trial.COLUMNS} for name in names]
    output.with_suffix(".md").write_text(in_words(table), encoding="utf-8")
    return table


def _is_open(row: dict[str, Any], limits: Budget, options: dict[str, Any]) -> bool:
    """Whether a row is not the answer to what is asked now."""
    if row["outcome"] == "time":
        return float(row["seconds"]) < limits.seconds
    if row["outcome"] == "memory":
        return float(row["reason"].rpartition("more than ")[2].removesuffix(" GB")) < limits.gigabytes
    columns = {"compiles": "compile_breaks", "onnx": "onnx_difference"}
    lacks = any(options.get(option) and not row[column] for option, column in columns.items())
    return row["outcome"] == "crashed" or (row["outcome"] in ("ok", "partly") and lacks)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a sweep's csv file, none if it is not there yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != trial.COLUMNS:
        raise RunError(f"{path} is no table of okdc inspect --all, or of another version: give another --output.")
    return rows


def summary(rows: Iterable[dict[str, str]]) -> list[tuple[str, int]]:
    """How many networks there are of each outcome, and how many do each thing that is examined."""
    rows = list(rows)
    counts = Counter(row["outcome"] for row in rows)
    compiled = [row["compile_breaks"] == "0" for row in rows if row["compile_breaks"]]
    exported = [_is_exported(row["onnx_difference"]) for row in rows if row["onnx_difference"]]
    narrowed = [row["narrowed"] == "yes" for row in rows if row["narrowed"]]
    asked_for = [
        ("narrowed", narrowed),
        ("compiled without a break", compiled),
        ("exported to ONNX within 1e-5", exported),
    ]
    return [
        ("networks", len(rows)),
        *sorted(counts.items()),
        ("shared exactly, eval and train mode", sum(row["shared"] == "exact" for row in rows)),
        ("grown in depth", sum(bool(row["grown"]) for row in rows)),
        ("grown by its own blocks", sum(row["own_blocks"] == "yes" for row in rows)),
        ("every gradient there", sum(row["trains"] == "yes" for row in rows)),
        ("stripped exactly", sum(row["strip"] == "exact" for row in rows)),
        ("default cut leaves 5% of the FLOPs or more", sum(float(row["tail_flops"] or 0) >= 0.05 for row in rows)),
        *((label, sum(good)) for label, good in asked_for if good),
    ]


def in_words(rows: Sequence[dict[str, str]]) -> str:
    """A sweep as Markdown: counts of each outcome, then by name and cause what failed and what is not the rule."""
    versions = "; ".join(sorted({row["versions"] for row in rows}))
    lines = ["# What okdc can do with these networks", "", f"Measured with {versions}.", ""]
    lines += ["| | networks |", "|---|---|"]
    lines += [f"| {label} | {count} |" for label, count in summary(rows)]
    took = sum(float(row["seconds"] or 0) for row in rows)
    lines += ["", f"All of them together took {took / 60:.0f} minutes of one process."]
    for title, found in [
        ("Not ok", {row["network"]: f"{row['outcome']}: {row['reason']}" for row in rows if row["outcome"] != "ok"}),
        ("Grown by a block of okdc's", {r["network"]: r["grown"] for r in rows if r["own_blocks"] == "no"}),
        ("Not narrowed", {r["network"]: r["narrowed"] for r in rows if r["narrowed"] not in ("", "yes")}),
        ("torch.compile", {r["network"]: r["compile_breaks"] for r in rows if r["compile_breaks"] not in ("", "0")}),
        ("ONNX", {r["network"]: r["onnx_difference"] for r in rows if not _is_exported(r["onnx_difference"] or "0")}),
    ]:
        causes: dict[str, list[str]] = {}
        for name, cause in found.items():
            causes.setdefault(cause.replace(name, "NAME"), []).append(name)
        if causes:
            lines += ["", f"## {title}", ""]
            lines += [f"- {', '.join(names)}: {cause}" for cause, names in causes.items()]
    return "\n".join(lines) + "\n"


def _is_exported(difference: str) -> bool:
    try:
        return float(difference) <= 1e-5
    except ValueError:  # a reason
        return False


def _start(context: Any, name: str, limits: Budget, options: dict[str, Any]) -> _Job:
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(name, limits, options, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Job(name, process, mine, time.monotonic())


def _examine(name: str, limits: Budget, options: dict[str, Any], answer: Connection) -> None:
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    torch.set_num_threads(1)
    started, least = time.monotonic(), trial.least_gigabytes(name)
    if least > limits.gigabytes:
        reason = f"too large for the limit: {trial.COPIES} copies of its weights take {least:.0f} GB, more than "
        answer.send(_ended(name, "memory", f"{reason}{limits.gigabytes:g} GB", time.monotonic() - started))
    else:
        answer.send(trial.examine(name, **options))


def _end_with_the_sweep() -> None:
    """A sweep that is killed leaves nothing behind: a network can go on for minutes, in gigabytes."""
    sweep = multiprocessing.parent_process()
    if sweep is not None:
        sweep.join()
        os._exit(1)


def _result(job: _Job, limits: Budget) -> dict[str, Any] | None:
    """The row of a job that is done, or that had to be ended; None while it goes on."""
    seconds = time.monotonic() - job.started
    ended = not job.process.is_alive()
    if job.answer.poll():
        try:
            row = job.answer.recv()
            job.process.join()
            return row
        except EOFError:  # it died before it answered
            job.process.join()
            ended = True
    if ended:
        outcome, reason = "crashed", f"the process ended with exit code {job.process.exitcode}"
    elif seconds > limits.seconds:
        outcome, reason = "time", f"not done after {limits.seconds:g} seconds"
    elif _gigabytes(job.process.pid) > limits.gigabytes:
        outcome, reason = "memory", f"needs more than {limits.gigabytes:g} GB"
    else:
        return None
    job.process.kill()
    job.process.join()
    return _ended(job.name, outcome, reason, seconds)


def _ended(name: str, outcome: str, reason: str, seconds: float) -> dict[str, Any]:
    """The row of a network that was not examined to the end."""
    basics = {"network": name, "family": trial.family(name), "versions": trial.VERSIONS}
    return basics | {"outcome": outcome, "reason": reason, "seconds": round(seconds, 1)}


def _gigabytes(pid: int) -> float:
    """Memory that a process has resident; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def _write(path: Path, rows: Iterable[dict[str, Any]], mode: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, trial.COLUMNS, restval="", lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(rows)


_NAMES = """
beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilenetv5_base
mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small test_nfnet pit_ti_224
pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d
test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p
xcit_nano_12_p8_224
"""
_SMALLEST = frozenset(_NAMES.split())  # of timm 1.0.31's families; those of other families are measured
