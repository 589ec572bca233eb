"""Whole comparisons: of the user's own module in this process, and by the command line, gone on with after a kill."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import okdc
from okdc.cli import main
from okdc.errors import RecipeError, RunError
from tests.helpers.networks import Tiny

LABELS = torch.arange(16) % 4
BATCHES = [
    (torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(at)) + LABELS[:, None, None, None], LABELS)
    for at in range(4)
]
SMALL = ["--data", "digits", "--model", "resnet20_cifar", "--img-size", "16", "-j", "0", "-b", "512", "--device", "cpu"]


def compare(folder: Path, **settings: object) -> okdc.Comparison:
    return okdc.compare(
        Tiny(), BATCHES, BATCHES[:2], output=folder, experiment="c", device="cpu", epochs=2, lr=0.05, **settings
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> okdc.Comparison:
    """Three methods of which one cannot be had, two seeds."""
    return compare(tmp_path_factory.mktemp("compare"), methods=["dml", "one", "kd"], seeds=2)


def test_every_arm_has_its_runs_and_the_table_says_what_they_say(found: okdc.Comparison) -> None:
    by_name = {line.name: line for line in found.lines}
    longer = next(name for name in by_name if name.startswith("baseline-"))
    assert by_name.keys() >= {"baseline", "one", "dml", "kd", longer}
    for name, line in by_name.items():
        for seed, score in line.scores.items():
            report = json.loads((found.path / f"{name}-s{seed}" / "report.json").read_text())
            assert report["history"][-1]["eval_top1"] == score and report["recipe"]["train"]["seed"] == seed
    assert list(by_name["one"].scores) == [42, 43] and by_name["one"].gain is not None
    assert by_name["dml"].compute == pytest.approx(2, rel=0.01) and by_name["dml"].equal is not None
    assert "--teacher" in (by_name["kd"].problem or "") and not by_name["kd"].scores
    means = [line.spread.mean for line in found.lines if line.spread]
    assert means == sorted(means, reverse=True) and found.lines[-1].name == "kd"


def test_it_is_told_as_a_page_a_table_and_numbers(found: okdc.Comparison) -> None:
    page = (found.path / "compare.html").read_text(encoding="utf-8")
    told = (found.path / "compare.md").read_text(encoding="utf-8")
    assert "Does it help?" in page and "--teacher" in page and "<script" not in page
    assert all(line.name in page and line.name in told for line in found.lines)
    rows = {row["name"]: row for row in csv.DictReader((found.path / "compare.csv").read_text().splitlines())}
    one = next(line for line in found.lines if line.name == "one")
    assert float(rows["one"]["seed_42"]) == one.scores[42] and float(rows["one"]["gain_mean"]) == one.gain.mean  # type: ignore[union-attr]
    assert json.loads((found.path / "compare.json").read_text())["verdict"] == found.verdict


def test_what_is_done_is_not_done_again_and_more_may_be_asked_for(
    found: okdc.Comparison, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in found.path.glob("*/last.pth.tar")}
    again = compare(found.path.parent, methods=["dml", "one", "baseline"], seeds=3, equal_compute=False)
    assert "3 runs, " in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [len(line.scores) for line in again.lines] == [3, 3, 3]
    with pytest.raises(RunError, match=r"holds a run of other settings: train\.weight_decay was 0\.0005 and is 0\.1"):
        compare(found.path.parent, methods=["one"], seeds=1, equal_compute=False, weight_decay=0.1)


def test_rates_are_not_tuned_on_batches_that_cannot_be_set_aside(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="give data=FOLDER"):
        compare(tmp_path, methods=["one"], tune="lr")


def test_rates_are_tuned_on_training_images_and_each_arm_keeps_its_best(tmp_path: Path) -> None:
    found = okdc.compare(
        Tiny(10), data="digits", img_size=16, batch_size=128, workers=0, device="cpu", epochs=1, lr=0.03, seeds=1,
        methods=["one"], tune="lr", equal_compute=False, output=tmp_path, experiment="c",
    )  # fmt: skip
    for line in found.lines:
        tried = {}
        for report in (tmp_path / "c" / "tuning").glob(f"{line.name}-lr*/report.json"):
            facts = json.loads(report.read_text())
            assert facts["recipe"]["data"]["holdout"] == pytest.approx(200 / 1437)
            tried[facts["recipe"]["train"]["lr"]] = facts["history"][-1]["eval_top1"]
        assert {0.01, 0.03, 0.09} <= tried.keys() and tried[line.lr] == max(tried.values())
        assert len(tried) == 5 or line.lr not in (min(tried), max(tried))  # at an end, the grid grew


def test_a_diverging_run_and_a_wrong_method_are_lines_and_the_command_line_says_so(tmp_path: Path) -> None:
    command = ["compare", *SMALL, "--epochs", "1", "--methods", "one,kd", "--seeds", "1", "--no-equal-compute"]
    result = CliRunner().invoke(main, [*command, "--output", str(tmp_path), "--experiment", "c"])
    assert result.exit_code == 0, result.output
    assert "kd is not complete" in result.output and "1 of 2" in result.stderr and "compare.html" in result.output
    assert "at equal" not in result.output and "top-1, %" in result.output
    assert "equal compute" not in (tmp_path / "c" / "compare.html").read_text()
    assert "as much compute" not in (tmp_path / "c" / "compare.md").read_text()
    assert (tmp_path / "c" / "logs" / "one-s42.log").is_file()


@pytest.mark.crash
def test_a_comparison_that_is_killed_goes_on_exactly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "okdc", "compare", *SMALL, "--epochs", "6", "--methods", "one", "--seeds", "1"]
    command += ["--no-equal-compute", "--output", str(tmp_path), "--experiment"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "whole"], check=True, env=environment, capture_output=True)
    process = subprocess.Popen([*command, "cut"], env=environment)
    while not (tmp_path / "cut" / "one-s42" / "summary.csv").is_file():
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "compare.json").exists()
    for _ in range(600):  # its run has got a SIGTERM, saves and ends
        if "Stopped" in (tmp_path / "cut" / "logs" / "one-s42.log").read_text():
            break
        time.sleep(0.1)
    subprocess.run([*command, "cut"], check=True, env=environment, capture_output=True)
    for name in ("baseline-s42", "one-s42"):
        weights = [torch.load(tmp_path / each / name / "model_best.pth.tar")["state_dict"] for each in ("whole", "cut")]
        assert all(torch.equal(a, b) for a, b in zip(*(each.values() for each in weights), strict=True))
