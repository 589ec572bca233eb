"""What a training gives beside the student: of the best epoch, exported, verified, and shown as what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import okdc
from okdc import pipeline, tasks
from okdc.cli import tables
from okdc.data import wrap
from okdc.pipeline import byproducts
from okdc.recipe import ExportSettings
from okdc.training import checkpoint
from tests.helpers.networks import Tiny
from tests.pipeline.test_teacher import DataLoaders

QUICK = {"epochs": 2, "lr": 0.05, "batch_sizes": [1]}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> okdc.Result:
    """A finished FFL run of a network that is an object."""
    torch.manual_seed(0)
    data = DataLoaders()
    return okdc.compress(
        Tiny(), data.train, data.validation, method="ffl", output=tmp_path_factory.mktemp("runs"), **QUICK
    )


def test_it_is_exported_and_verified_beside_the_student(result: okdc.Result) -> None:
    bundle = result.path / byproducts.FOLDER / "fused"
    assert set(result.byproducts) == {"fused"} and pipeline.verify(bundle)["verdict"] != "fail"
    facts = json.loads((result.path / "report.json").read_text())
    student, fused = facts["byproducts"]
    assert (student["name"], fused["name"]) == ("Tiny", "fused")
    assert fused["verdict"] != "fail" and fused["reason"] is None and fused["agreement"] == 100
    assert fused["params"] > 2 * student["params"] * 0.9 and fused["flops"] > student["flops"]
    assert student["top1"] == facts["metrics"]["top1"] and fused["top1"] == facts["metrics"]["ensemble_top1"]


def test_the_report_and_the_terminal_name_it(result: okdc.Result, capsys: pytest.CaptureFixture[str]) -> None:
    for page in ("report.md", "report.html"):
        text = (result.path / page).read_text()
        assert "Also trained" in text and "byproducts/fused" in text
    tables.show_result(result)
    said = " ".join(capsys.readouterr().out.split())
    assert "Ensemble, top-1" in said and "does not ship" not in said, "the fused network is the ensemble"
    assert "Also trained: fused" in said and "fused" in said.partition("Also trained: fused")[2]


def test_it_is_that_of_the_best_epoch(result: okdc.Result) -> None:
    best = checkpoint.load(result.path / checkpoint.BEST)["method"]
    fused = result.byproducts["fused"]
    for key, value in fused.state_dict().items():
        assert torch.equal(value, best[key.removeprefix("method.")])
    assert not fused.training


class Unexportable(Tiny):
    """Decides by what it sees, which the last of the exporters takes for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.sum() > 0 else -1.0)


def test_one_that_fails_costs_the_others_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaders = DataLoaders()
    data = wrap(loaders.train, loaders.validation, num_classes=4)
    networks: dict[str, nn.Module] = {"broken": Unexportable().eval(), "whole": Tiny().eval(), "other": Tiny(3).eval()}
    rows = byproducts.export(
        networks, None, data, ExportSettings(batch_sizes=[1]), tmp_path, {"title": "run"}, tasks.get()
    )
    found = {row["name"]: row for row in rows}
    assert [row["name"] for row in rows] == list(networks)
    assert found["whole"]["verdict"] != "fail" and (tmp_path / "byproducts" / "whole" / "model.onnx").is_file()
    for name, reason in (("broken", "not fit to ship"), ("other", "4 classes")):
        assert found[name]["verdict"] == "fail" and reason in found[name]["reason"]
        assert not (tmp_path / "byproducts" / name).exists()


def test_one_that_cannot_be_had_costs_the_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object) -> dict[str, nn.Module]:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("okdc.methods.ffl.Ffl.byproducts", fails)
    data = DataLoaders()
    result = okdc.compress(Tiny(), data.train, data.validation, method="ffl", output=tmp_path, **QUICK)
    assert result.byproducts == {} and result.verification["verdict"] != "fail"
    rows = json.loads((result.path / "report.json").read_text())["byproducts"]
    assert rows[-1]["verdict"] == "fail" and "no such luck" in rows[-1]["reason"]
