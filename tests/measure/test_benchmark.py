"""One fair table of every format: what was measured, what is fit to ship, and why the rest is missing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result

from okdc import deploy, pipeline
from okdc.cli import main
from okdc.deploy import targets, torch_runner
from okdc.measure import benchmark
from okdc.recipe import ExportSettings

NO_GPU = targets.find("tensorrt").module.available() is not None


def okdc(*words: Any) -> Result:
    return CliRunner().invoke(main, ["benchmark", *map(str, words)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """`okdc benchmark NAME`, which shows a table and writes it in three ways."""
    folder = tmp_path_factory.mktemp("tables")
    outputs = [word for end in ("md", "csv", "json") for word in ("--output", folder / "new" / f"speed.{end}")]
    words = ("test_resnet", "--img-size", 32, "--num-classes", 4, "--batch-sizes", "1,2", "--device", "cpu")
    return okdc(*words, "--no-compile", *outputs), folder / "new"


def test_every_format_that_is_here_is_measured_and_the_others_say_why(measured: tuple[Result, Path]) -> None:
    done, folder = measured
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "speed.json").read_text())
    rows = {row["format"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    named = {target.row for target in targets.known().values()} | {"onnx on cuda", "onnx on tensorrt"}
    assert set(rows) == named | {"torch eager"}, "every format there could be has a row"
    for name in ("torch eager", "onnx", "onnx_fp16", "onnx_int8", "torch.export"):
        assert rows[name]["status"].partition(";")[0] == "ok" and rows[name]["top1"] is None
        assert [each["batch"] for each in rows[name]["latency"]] == [1, 2]
        for each in rows[name]["latency"]:
            assert 0 < each["p50_ms"] <= each["p95_ms"] and each["images_per_second"] > 0 and each["cpu_ms"] > 0
    assert rows["onnx_int8"]["mb"] < 0.5 * rows["onnx"]["mb"]
    if NO_GPU:
        assert rows["tensorrt"]["status"].startswith("unavailable: TensorRT needs an NVIDIA GPU")
        assert rows["onnx on cuda"]["status"].startswith("unavailable: ") and rows["tensorrt"]["latency"] == []
    assert (report["device"], report["threads"], report["source"]) == ("cpu", 1, "test_resnet")
    assert report["environment"]["torch"] and report["schema_version"] == 1


def test_the_table_is_the_same_on_the_screen_in_markdown_and_in_csv(measured: tuple[Result, Path]) -> None:
    done, folder = measured
    report = json.loads((folder / "speed.json").read_text())
    with open(folder / "speed.csv", newline="") as file:
        head, *lines = csv.reader(file)
    assert tuple(head) == benchmark.columns(report) and lines == benchmark.lines(report)
    assert [line[0] for line in lines][:2] == ["torch eager", "torch eager"]  # a line for each batch size
    text = (folder / "speed.md").read_text()
    for line in lines:
        assert f"| {' | '.join(line)} |" in text
        assert all(cell in done.output for cell in line[:1] + line[2:])
    assert "a process for each format" in " ".join(done.output.split()) and "a process for each format" in text


def test_the_compiled_network_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = {"depth": 0, "embed_dim": 16, "num_heads": 1, "img_size": 32}  # few kernels to compile
    bundle, settings = tmp_path / "export", ExportSettings(onnx=False, torch=True, batch_sizes=[])
    facts = {"preprocess": timm.data.resolve_data_config({"input_size": (3, 32, 32)}), "classes": tuple("abcd")}
    network = timm.create_model("test_vit", num_classes=4, **built)
    deploy.export_bundle(network, None, settings, bundle, arch="test_vit", model_args=built, **facts)
    verification = pipeline.verify(bundle, device="cpu", batch_sizes=[2])
    monkeypatch.setattr(pipeline, "verify", lambda *_, **__: verification)  # once for both compilers
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    report = benchmark.benchmark(bundle, device="cpu", batch_sizes=[2])
    eager, compiled = report["rows"][:2]
    assert (eager["format"], compiled["format"]) == ("torch eager", "torch compiled")
    assert [each["batch"] for each in compiled["latency"]] == [2] and compiled["latency"] != eager["latency"]
    rows = {row["format"]: row["status"] for row in report["rows"]}
    assert rows["onnx_int8"].endswith("okdc export RUN --torch --int8")  # an export replaces what is there
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "another"))
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    eager, compiled = benchmark.benchmark(bundle, device="cpu", batch_sizes=[2])["rows"][:2]
    assert (eager["format"], compiled["format"]) == ("torch eager", "torch compiled")
    assert compiled["status"].startswith("unavailable: ") and str(tmp_path) not in compiled["status"]
    assert not compiled["latency"] and eager["latency"]


@pytest.mark.parametrize(("device", "mode"), [("cpu", None), ("cuda:1", "reduce-overhead")])
def test_the_compiled_network_is_timed_as_engines_are(
    device: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = SimpleNamespace(to=lambda device: "moved")
    monkeypatch.setattr("okdc.deploy.bundle.load_student", lambda path: network)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # to be put back
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: asked.append((network, options)))
    torch_runner.runner("bundle", device, compiled=True)
    assert asked == [("moved", {"dynamic": False, "mode": mode})]
    assert targets.find("tensorrt").module.LATENCY == {"cuda_graph": True}


def test_wrong_use_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    wrong = okdc("test_resnet", "--output", tmp_path / "speed.txt")
    assert wrong.exit_code == 2 and "ends in .md, .csv or .json" in " ".join(wrong.stderr.split())
    (tmp_path / "run").mkdir()
    empty = okdc(tmp_path / "run")
    assert empty.exit_code == 2 and "okdc export" in empty.stderr
    unknown = okdc("test_resnett")
    assert unknown.exit_code == 2 and "test_resnet" in unknown.stderr
    trained = okdc("test_resnet", "--data", "digits")
    assert trained.exit_code == 2 and "leave --data out" in " ".join(trained.stderr.split())
