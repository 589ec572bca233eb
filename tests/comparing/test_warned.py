"""What runs warned of reaches whoever compares: from each run's log, once, with the arms and seeds it concerns."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import okdc
from okdc.cli.tables import show_comparison
from okdc.comparing.running import Job
from okdc.comparing.warned import Warned, warned
from okdc.losses import cross_entropy
from okdc.recipe import Recipe
from okdc.system import saying
from tests.comparing.test_comparison import compare


class Idle(okdc.Method):
    """Its branch learns nothing, which is found before training, and a loss teaches nothing, which is found after."""

    members = 2

    def losses(self, out, labels):
        return {"ce": cross_entropy(out.logits[0], labels), "kl": 0 * out.logits[0].sum()}


def test_a_comparison_tells_what_its_runs_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("okdc").warning("of what was said before")
    found = compare(tmp_path, methods=[Idle], seeds=2, equal_compute=False)
    assert [each.runs for each in found.warnings] == [{"Idle": [42, 43]}] * 2
    unreached, idle = (each.text for each in found.warnings)
    assert "no loss reaches branch1" in unreached and "the loss kl of Idle was 0 in every step" in idle
    show_comparison(found)
    documents = [(found.path / f"compare.{kind}").read_text(encoding="utf-8") for kind in ("md", "html")]
    for text in (capsys.readouterr().out, *documents):
        assert text.count("the loss kl of Idle was 0") == 1 and "Idle, seeds 42 and 43" in text
    told = json.loads((found.path / "compare.json").read_text())["warnings"]
    assert told[1] == {"who": "Idle, seeds 42 and 43", "text": idle, "runs": {"Idle": [42, 43]}}


def test_warnings_that_differ_in_figures_alone_are_one(tmp_path: Path) -> None:
    def job(name: str, *texts: str) -> Job:
        made = Job(tmp_path / name, Recipe(), 1)
        made.folder.mkdir()
        with saying.logged(made.folder / "run.log"):
            saying.say("opening: 3 epochs")
            for text in texts:
                logging.getLogger("okdc").warning("%s", text)
        return made

    steep = "a gradient {} times\nas large: --clip-grad {}, or less"
    runs = {
        "baseline": {seed: job(f"b{seed}", "files of x are left out: 2") for seed in (1, 2, 3)},
        "one": {seed: job(f"o{seed}", "files of x are left out: 2", "loss ce/1", "loss ce/2") for seed in (1, 2, 3)},
        "ahbf": {1: job("a1", steep.format(7, 3.1)), 2: job("a2"), 3: job("a3", *[steep.format(8, "3.0")] * 2)},
        "kd": {},
    }
    assert [(each.who, each.text) for each in warned(runs)] == [
        ("baseline and one, seeds 1 to 3", "files of x are left out: 2"),
        ("one, seeds 1 to 3", "loss ce/1"),
        ("one, seeds 1 to 3", "loss ce/2"),
        (
            "ahbf, seeds 1 and 3",
            "a gradient 7 times as large: --clip-grad 3.1, or less (With the figures of ahbf, seed 1.)",
        ),
    ]


def test_of_many_warnings_the_rest_is_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = okdc.Comparison(tmp_path, "top1", [], "", recipe=Recipe().to_dict())
    found.warnings.extend(Warned("x", {"one": [at]}) for at in range(10))
    show_comparison(found)
    told = capsys.readouterr().out
    assert "one, seed 7: x" in told and "one, seed 8" not in told and f"2 more warnings: {tmp_path}" in told
