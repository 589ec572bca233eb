"""Exit codes: each row of the table in docs/files.md, and what ends with it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import Tensor

from okdc import deploy
from okdc.cli import main
from okdc.system.signals import SIGNALS, StopSignal
from tests.helpers.networks import Tiny

TABLE = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")
DATA = "--data digits --img-size 8 -j 0 --device cpu --epochs 1 -b 256 --no-onnx --method one"
TINY = "tests.helpers.networks:Tiny"
SMALL = "--model-kwargs classes=10 width=4"


def okdc(line: str) -> Result:
    return CliRunner().invoke(main, line.split())


class Rung(Tiny):
    """Gets a signal, once, in the first step in which the loop listens."""

    waiting: list[signal.Signals] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.waiting and isinstance(getattr(signal.getsignal(self.waiting[0]), "__self__", None), StopSignal):
            signal.raise_signal(self.waiting.pop())
        return super().forward(x)


def test_the_table_has_the_codes_that_are_tried_here() -> None:
    section = TABLE.partition("## Exit codes")[2].partition("\n## ")[0]
    codes = {int(code) for row in re.findall(r"(?m)^\| ([\d, ]+) \|", section) for code in row.split(",")}
    assert codes == {0, 1, 2, 3, 128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM}


def test_a_run_is_done_then_its_bundle_is_no_longer_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0, and as JSON what came of it; then 3."""
    monkeypatch.chdir(tmp_path)
    done = okdc(f"compress {DATA} --model {TINY} {SMALL} --json")
    assert done.exit_code == 0, done.output
    run: dict[str, Any] = json.loads(done.stdout)
    assert run["method"] == "one" and Path(run["report"]).is_file() and run["metrics"]["epochs"] == 1
    assert run["baseline"] is None and run["bundle"] is None and run["verification"] is None
    quick = "--images 32 --batch-sizes 1 --json"
    exported = okdc(f"export {run['run']} --model {TINY} {quick}")
    assert exported.exit_code == 0 and json.loads(exported.stdout)["verdict"] == "pass", exported.output
    assert json.loads(okdc(f"verify {run['run']} {quick}").stdout)["verdict"] == "pass"
    with Path(run["run"], "export", "labels.txt").open("a") as labels:
        labels.write("another\n")
    unfit = okdc(f"verify {run['run']} {quick}")
    assert unfit.exit_code == 3 and unfit.stdout == "" and "is not as it was exported: labels.txt" in unfit.stderr


def test_training_that_cannot_go_on(tmp_path: Path) -> None:
    done = okdc(f"compress {DATA} --model {TINY} {SMALL} --lr 1e30 -b 32 --output {tmp_path}")
    assert done.exit_code == 1 and "was not finite" in " ".join(done.stderr.split()), done.output


def test_a_bug_has_a_traceback() -> None:
    code = "from okdc import recipe; recipe.names = lambda: 1 / 0; from okdc.cli import main; main(['recipes'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("words", ["recipes a b", "compress --epohcs 3", "compress --data /nowhere", "methods ahbff"])
def test_wrong_use(words: str) -> None:
    assert okdc(words).exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_is_saved(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rung, "waiting", [number])
    done = okdc(f"compress {DATA} --model {__name__}:Rung {SMALL} --output {tmp_path} --experiment run -q")
    assert done.exit_code == 128 + number, done.output
    assert (tmp_path / "run" / "last.pth.tar").is_file() and "--resume" in done.stderr


def test_a_signal_while_files_are_written_leaves_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "export_bundle", lambda *_, **__: signal.raise_signal(rung))
    run, rung = tmp_path / "run", signal.SIGTERM
    before = [signal.getsignal(number) for number in SIGNALS]
    done = okdc(f"compress {DATA} --onnx --model {TINY} {SMALL} --output {tmp_path} --experiment run -q")
    assert done.exit_code == 128 + rung, done.output
    told = f"Stopped: training is done, and {run / 'model_best.pth.tar'} is the student; its files are not all written."
    assert told in done.stderr and f"Continue with: okdc compress --resume {run / 'last.pth.tar'}" in done.stderr
    assert f"\nTo write the files alone: okdc export {run}\n" in done.stderr
    assert (run / "report.json").is_file() and (run / "model_best.pth.tar").is_file() and not (run / "export").exists()
    rung = signal.SIGINT
    done = okdc(f"export {run} --model {TINY} -q")
    assert done.exit_code == 128 + rung and f"nothing was put in {run / 'export'}. Begin again" in done.stderr
    assert [signal.getsignal(number) for number in SIGNALS] == before
