"""`okdc check`: what is sound passes, each planted fault is found by the demand that it breaks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from okdc import testing
from okdc.cli import main
from okdc.cohort import Cohort, CohortOutput
from okdc.errors import RecipeError
from okdc.losses import cross_entropy, kl
from okdc.methods import Method
from okdc.ranks import gather
from okdc.testing import Case, golden

HERE = Path(__file__)
NETWORK = "tests.helpers.networks:Tiny"
GATHERED = "two processes give what one gives"


class Sound(Method):
    """Labels, a consensus, a memory in a buffer, and a contrast of all images of a batch."""

    taps = ("embeddings",)
    centre: Tensor

    def __init__(self, cohort: Cohort, *, weight: float = 1.0) -> None:
        super().__init__(cohort)
        self.weight = weight
        self.register_buffer("centre", torch.zeros(cohort.anatomy.num_classes))

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        mean = self.ensemble(out)
        parts = {f"ce/{i}": cross_entropy(z, labels) + kl(z, mean) for i, z in enumerate(out.logits)}
        centred = self.weight * (out.logits[0].float() - self.centre).square().mean()
        self.remember(out.logits[0].detach().float())
        return parts | {"centre": centred, "contrast": self.contrast(out.embeddings[0].float())}

    def remember(self, logits: Tensor) -> None:
        if self.training:
            self.centre.lerp_(gather(logits).mean(0), 0.5)

    def contrast(self, embeddings: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            embeddings = F.normalize(gather(embeddings))
            return (embeddings @ embeddings.T).exp().mean()


class Alone(Sound):
    """Its one line is changed by hand: each process contrasts its own images."""

    def contrast(self, embeddings: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            embeddings = F.normalize(embeddings)
            return (embeddings @ embeddings.T).exp().mean()


class Forgetful(Sound):
    """Another line: the memory is no buffer."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(cohort)
        centre = self.centre
        del self.centre
        self.centre = centre


class Summed(Sound):
    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        return {"ce": F.cross_entropy(out.logits[0], labels, reduction="sum") + 0 * out.logits[1].sum()}


class Picky(Sound):
    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        return {"ce": out.logits[0].gather(1, labels[:, None]).mean() + 0 * out.logits[1].sum()}


def verdicts(method: type[Method], **settings: float) -> dict[str, testing.Row]:
    report = testing.check(method, NETWORK, size=16, processes=False, **settings)
    assert report.ok == all(row.verdict != "broken" for row in report.rows)
    return {row.demand: row for row in report.rows}


def test_a_sound_method_passes() -> None:
    rows = verdicts(Sound, weight=0.5)
    assert rows.keys() == {"it can be built and tried", *testing.DEMANDS, GATHERED, "cost of a step"}
    assert {row.verdict for name, row in rows.items() if name != GATHERED} == {"ok"}
    assert rows[GATHERED].verdict == "skipped" and re.match(r"1\.\d times the FLOPs", rows["cost of a step"].words)
    with pytest.raises(RecipeError, match="Sound has no setting 'wait'"):
        verdicts(Sound, wait=1.0)


@pytest.mark.parametrize(
    ("method", "broken", "words"),
    [
        (Forgetful, "a run goes on to the bit", "has other losses.*has to be a buffer"),
        (Summed, "losses are means", "ce is twice as large for twice the images: it is a sum"),
        (Picky, "labels may be probabilities", r"RuntimeError: .*test_check.py:\d+"),
    ],
)
def test_a_planted_fault_is_found(method: type[Method], broken: str, words: str) -> None:
    rows = verdicts(method)
    assert rows[broken].verdict == "broken"
    assert re.search(words, rows[broken].words), rows[broken].words


@pytest.mark.parametrize(
    ("error", "words"),
    [(ZeroDivisionError, r"line \d+ of test_check.py: ZeroDivisionError: division by zero"), (None, "a dict")],
)
def test_what_cannot_be_tried_ends_the_check(error: type[Exception] | None, words: str) -> None:
    kind = type("Failing", (Sound,), {"losses": lambda self, out, labels: 1 / 0 if error else out.logits[0].mean()})
    (row,) = verdicts(kind).values()
    assert row.verdict == "broken" and re.search(words, row.words), row.words


@pytest.mark.ddp
def test_two_processes_find_what_is_not_gathered() -> None:
    testing.two_processes(Case(Sound, NETWORK, 16))
    with pytest.raises(AssertionError, match=r"two processes with half a batch each change .* okdc.ranks.gather"):
        testing.two_processes(Case(Alone, NETWORK, 16))


def test_the_command_prints_a_page_and_ends_with_1_where_something_is_broken() -> None:
    typed = ["check", f"{HERE}:Sound", "--model", NETWORK, "--img-size", "16", "--no-processes"]
    said = CliRunner().invoke(main, [*typed, "--method-kwargs", "weight=2"])
    assert said.exit_code == 0 and "ok       everything learns" in said.output and "Nothing is broken." in said.output
    typed[1] = f"{HERE}:Forgetful"
    told = CliRunner().invoke(main, [*typed, "--json"])
    found = json.loads(told.output)
    assert told.exit_code == 1 and not found["ok"]
    assert [row["demand"] for row in found["rows"] if row["verdict"] == "broken"] == ["a run goes on to the bit"]
    assert found["rows"][0]["verdict"] == "note" and "self.centre holds a tensor" in found["rows"][0]["words"]


def test_golden_numbers_are_read_and_compared(tmp_path: Path) -> None:
    save_file({"loss": torch.tensor([1.0, 2.0])}, tmp_path / "mine.safetensors", {"meta": '{"temperature": 3}'})
    tensors, meta = golden.load(tmp_path / "mine.safetensors")
    assert tensors["loss"].dtype == torch.float64 and meta == {"temperature": 3}
    assert golden.assert_same(tensors["loss"] + 1e-7, tensors["loss"]) == pytest.approx(5e-8)
    with pytest.raises(AssertionError, match=r"5\.0e-03 of the largest expected value"):
        golden.assert_same(tensors["loss"] + 0.01, tensors["loss"])
