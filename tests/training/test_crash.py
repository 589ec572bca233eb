"""Runs that are killed at any place and resumed end bit for bit as runs that were not."""

from __future__ import annotations

import csv
import itertools
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from okdc import deploy
from okdc.training import checkpoint
from tests.helpers.crashing import Accident, Server

CLASSES, PER_CLASS, BATCH = 4, 12, 8
STEPS = CLASSES * PER_CLASS // BATCH
TIMES = ("seconds", "images_per_second", "data_wait", "between", "waited")
LONG = pytest.mark.crash
TYPED = "args"  # the recipe, which says also where the images are and how many workers read them


@dataclass(frozen=True)
class Plan:
    """A run, and the seed of what happens to it."""

    method: str
    workers: int = 0
    ema: bool = False
    mixup: bool = False
    bf16: bool = False
    devices: int = 1
    epochs: int = 2
    kills: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        on = [name for name in ("ema", "mixup", "bf16") if getattr(self, name)]
        return "-".join([self.method, f"j{self.workers}", *on])

    def words(self, images: Path) -> list[str]:
        """The command line of the run, without a place to be."""
        words = f"compress --model tests.helpers.networks:Tiny --method {self.method} --data {images} --img-size 16"
        words += f" -b {BATCH} --epochs {self.epochs} -j {self.workers}"
        words += " --crop-padding 2 --lr 0.02 --no-onnx --log-interval 1"
        words += " --model-ema --model-ema-decay 0.9" * self.ema + " --mixup 0.4" * self.mixup + " --amp" * self.bf16
        words += f" --devices {self.devices}" * (self.devices > 1)
        words += " --resident off" * (self.workers > 0)  # else nothing is left for workers to do
        return f"{words} --recovery-interval {1 + self.seed % 3} --sched-on-updates --warmup-epochs 1".split()

    def accidents(self) -> Iterator[Accident]:
        """One of each kind in a random order and at random places, again and again."""
        draw = random.Random(f"{self.name} {self.seed}")
        steps = self.epochs * STEPS
        while True:
            kinds = [
                Accident("step", draw.randint(1, steps - 2), delay=draw.uniform(0, 0.1)),
                Accident("file", draw.randint(1, 2 * steps)),
                Accident("torn", draw.randint(1, steps // 2), part=draw.random()),
            ]
            yield from draw.sample(kinds, len(kinds))


def refused(plan: Plan) -> bool:
    """What okdc says no to: L-MCL's pairs are of one class, and PCL ships an average of its own."""
    return (plan.method == "lmcl" and plan.mixup) or (plan.method == "pcl" and plan.ema)


SHORT = [
    Plan("baseline", 2, ema=True, mixup=True, kills=3),
    Plan("ahbf", 0, ema=True, bf16=True),
    Plan("pcl", 2, mixup=True, bf16=True),
    Plan("lmcl", 2, ema=True),
    Plan("afd", 0, mixup=True),
]
PLAIN = Plan("baseline", 2)
FULL = [
    Plan(method, 0, ema, mixup, bf16, kills=3)
    for method, ema, mixup, bf16 in itertools.product(("baseline", "ahbf", "pcl", "lmcl", "afd"), *[(False, True)] * 3)
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small images of four classes, each brighter in another quarter."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", PER_CLASS), ("val", 4)):
        for label, index in itertools.product(range(CLASSES), range(count)):
            pixels = draw.integers(0, 160, (16, 16, 3), dtype=np.uint8)
            pixels[4 * label : 4 * label + 4] += 80
            path = root / split / f"class{label}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def finish(server: Server, plan: Plan, images: Path, folder: Path, accidents: list[Accident]) -> list[Accident]:
    """Run to the end with `--resume auto`, however often it is killed; the accidents that did happen."""
    folder.mkdir()
    words = [*plan.words(images), "--experiment", "run", "--resume", "auto"]
    happened = []
    for accident in accidents:
        code, output = server.run(words, folder, accident)
        assert code in (0, -9), output
        assert "damaged" not in output, "a killed run left half a checkpoint under its final name"
        if code:
            happened.append(accident)
    code, output = server.run(words, folder)
    assert code == 0, f"after {happened}: {output}"
    return happened


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places at which two checkpoints differ, but for times and what was typed."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in one | other if key not in (*TIMES, TYPED)]
        lost = [f"{where}.{key}" for key in keys if key not in one or key not in other]
        return lost or [d for key in keys for d in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other)) for d in differences(*pair, f"{where}[{i}]")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and one.equal(other)
    else:
        same = type(one) is type(other) and (one == other or one != one)
    return [] if same else [where]


def compared(whole: Path, killed: Path) -> list[str]:
    """How two finished runs differ: checkpoints with all that they hold, summary.csv, and what lies in the folder."""
    found = []
    for name in (checkpoint.LAST, checkpoint.BEST):
        found += differences(checkpoint.load(whole / name), checkpoint.load(killed / name), name)
    one, other = ((folder / "summary.csv").read_text().splitlines() for folder in (whole, killed))
    found += differences(list(csv.DictReader(one)), list(csv.DictReader(other)), "summary.csv")
    ours, theirs = (
        {path.name for path in folder.iterdir() if "tfevents" not in path.name} for folder in (whole, killed)
    )
    return found + sorted(ours ^ theirs)


@pytest.mark.parametrize("plan", SHORT, ids=lambda plan: plan.name)
def test_a_run_that_is_killed_and_resumed_ends_as_if_nothing_had_happened(server, images, tmp_path, plan):
    assert finish(server, plan, images, tmp_path / "whole", []) == []
    accidents = list(itertools.islice(plan.accidents(), plan.kills))
    happened = finish(server, plan, images, tmp_path / "killed", accidents)
    assert happened
    assert compared(tmp_path / "whole" / "runs" / "run", tmp_path / "killed" / "runs" / "run") == []


@pytest.fixture(scope="module")
def whole(server: Server, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run of `PLAIN`, to which nothing happened."""
    folder = tmp_path_factory.mktemp("plain") / "whole"
    finish(server, PLAIN, images, folder, [])
    return folder / "runs" / "run"


def stop_and_go_on(
    server: Server, images: Path, folder: Path, accident: Accident | None, *flags: str, mend: Any = lambda: None
) -> tuple[int | None, str]:
    """Exit code and output of the run that something happened to, which is then finished."""
    folder.mkdir(exist_ok=True)
    words = [*PLAIN.words(images), *flags, "--experiment", "run", "--resume", "auto"]
    code, output = server.run(words, folder, accident)
    mend()
    again, rest = server.run(words, folder)
    assert again == 0 and "Continuing" in rest, output + rest
    return code, " ".join(output.split())


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=LONG)])
def test_a_signal_to_all_processes_of_a_run_saves_it(server, images, whole, tmp_path, name, code):
    stopped, output = stop_and_go_on(server, images, tmp_path, Accident(name, 4))
    assert stopped == code and "Continue with: okdc compress --resume" in output, output
    assert compared(whole, tmp_path / "runs" / "run") == []


@pytest.mark.parametrize(("what", "reason"), [("full", "File too large"), ("read-only", "Read-only file system")])
def test_a_disk_that_fails_stops_the_run_and_keeps_the_last_state(server, images, whole, tmp_path, what, reason):
    code, output = stop_and_go_on(server, images, tmp_path, Accident(what, 20))
    assert code == 2 and "could not write" in output and reason in output and "--resume auto" in output, output
    assert compared(whole, tmp_path / "runs" / "run") == []


def test_a_data_worker_that_is_killed_is_an_error_that_says_so(server, images, whole, tmp_path):
    code, output = stop_and_go_on(server, images, tmp_path, Accident("worker killed", 3))
    assert code == 1 and "a data worker died in step" in output and "fewer workers, -j N" in output, output
    assert compared(whole, tmp_path / "runs" / "run") == []


@LONG
def test_a_data_worker_that_hangs_is_an_error_that_says_where(server, images, whole, tmp_path):
    code, output = stop_and_go_on(server, images, tmp_path, Accident("worker stopped", 3), "--timeout", "5")
    assert code == 1 and "no data came for 5 seconds, in step" in output and "what was done is saved" in output, output
    assert compared(whole, tmp_path / "runs" / "run") == []


@LONG
@pytest.mark.parametrize(("split", "where"), [("train", "in step"), ("val", "in the validation of epoch 1")])
def test_an_image_that_never_comes_is_an_error(server, images, whole, tmp_path, split, where):
    copy = tmp_path / images.name
    shutil.copytree(images, copy)
    image = copy / split / "class0" / "0.png"
    image.unlink()
    os.mkfifo(image)  # opening it waits for somebody to write, as on a network disk that is gone

    def mend() -> None:
        image.unlink()
        shutil.copy(images / image.relative_to(copy), image)

    words = [*PLAIN.words(copy), "--experiment", "kept", "--resident", "auto", "--timeout", "4"]
    code, output = server.run(words, tmp_path)
    assert code == 2 and "no image came for 4 seconds while decoding" in " ".join(output.split()), output
    code, output = stop_and_go_on(server, copy, tmp_path, None, "-j", "0", "--timeout", "4", mend=mend)
    assert code == 1 and f"no data came for 4 seconds, {where}" in output, output
    assert compared(whole, tmp_path / "runs" / "run") == []


@LONG
def test_a_rank_that_is_killed_ends_the_run_which_goes_on_as_if_nothing_had_happened(server, images, tmp_path):
    plan = Plan("ahbf", 1, ema=True, mixup=True, devices=2)
    finish(server, plan, images, tmp_path / "whole", [])
    (tmp_path / "killed").mkdir()
    words = [*plan.words(images), "--experiment", "run", "--resume", "auto"]
    code, output = server.run(words, tmp_path / "killed", Accident("rank killed", 4))
    assert code == 1 and "was killed by SIGKILL" in output and "--resume auto" in " ".join(output.split()), output
    code, output = server.run(words, tmp_path / "killed")
    assert code == 0 and "Continuing" in output, output
    assert compared(tmp_path / "whole" / "runs" / "run", tmp_path / "killed" / "runs" / "run") == []


@LONG
@pytest.mark.parametrize("at", [1, 6])
def test_a_run_that_is_killed_while_it_exports_does_that_again_and_leaves_nothing(server, images, whole, tmp_path, at):
    code, output = stop_and_go_on(
        server, images, tmp_path, Accident("export", at), "--onnx", "--verify-images", "8", "--max-drop", "100"
    )
    assert code == -9, output
    run = tmp_path / "runs" / "run"
    assert compared(whole, run) == ["export"] and deploy.check_sums(run / "export") == []


@LONG
def test_every_combination_survives(server, images, tmp_path, capsys):
    runs, kills, found = 0, [], {}
    for plan in FULL:
        if refused(plan):
            continue
        for workers, seed in ((0, 0), (2, 1)):
            case = replace(plan, workers=workers, seed=seed)
            whole, folder = tmp_path / case.name, tmp_path / f"{case.name}-killed"
            finish(server, case, images, whole, [])
            kills += finish(server, case, images, folder, list(itertools.islice(case.accidents(), case.kills)))
            runs += 1
            if different := compared(whole / "runs" / "run", folder / "runs" / "run"):
                found[case] = different
            with capsys.disabled():
                print(f"{case.name}: {len(kills)} kills in {runs} runs so far, {len(found)} differ", flush=True)
    assert found == {}
