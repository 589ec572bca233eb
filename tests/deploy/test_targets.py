"""An export target is one file and one setting: a made-up one is asked for, ordered, judged, told of, removed whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import okdc
from okdc import deploy
from okdc.deploy import targets
from okdc.deploy.writing import further
from okdc.errors import ExportError
from okdc.measure import benchmark
from okdc.recipe import ExportSettings
from okdc.system import shipped
from okdc.verification import Exported
from tests.helpers.networks import Tiny

ROOT = Path(okdc.__file__).parents[1]
KNOWN = {"preprocess": {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}, "classes": tuple("abcd")}

BESIDE = """
def to_onnx():
    return importlib.import_module(".to_onnx", __package__)
"""

# A folder and a file beside it, made of model.onnx; it sorts before "onnx".
COREML = (
    """
import importlib, os, shutil
from pathlib import Path

FILE = "model.mlpackage"
DESCRIPTION = "for a device that there is not"
ALSO = {"model.mlpackage.json": "what that device must be"}
TOOL = "`python to_coreml.py` does nothing at all"
NEEDS = ("onnx",)
PRECISION = "fp16"
TOLERANCE = 1e-2
DEVICES = {"elsewhere": None}
PACKAGES = ("yaml",)


def available():
    return os.environ.get("COREML_MISSING")


def write(student, example, path, *, onnx):
    path.mkdir()
    shutil.copyfile(onnx, path / "weights")
    (path / "scale").write_text("1.0")
    path.with_name("model.mlpackage.json").write_text("{}")
    return {"made_of": onnx.name}


def runner(path, device="cpu", threads=None):
    session = to_onnx().runner(path / "weights", device, threads)
    scale = float((path / "scale").read_text())

    def run(images):
        return session(images) * scale

    run.provider = "CoreML"
    return run
"""
    + BESIDE
)

# A file that onnxruntime runs on a CPU.
PLAIN = (
    """
import importlib.util
from pathlib import Path

FILE = "model.coreml"
DESCRIPTION = "another name for model.onnx"
PREDICT = True


def available():
    return None


def write(student, example, path):
    return to_onnx().write(student, example, path)


def runner(path, device="cpu", threads=None):
    return to_onnx().runner(path, device, threads)
"""
    + BESIDE
)


@dataclass(frozen=True)
class Settings(ExportSettings):
    """With the one field that turns the target on."""

    coreml: bool = False


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`export/` with one more file."""
    copied = Path(shutil.copytree(ROOT / "export", tmp_path / "export", ignore=shutil.ignore_patterns("__pycache__")))
    (copied / "to_coreml.py").write_text(COREML)
    monkeypatch.setattr(shipped, "folder", lambda name: tmp_path / name)
    return copied


def export(bundle: Path, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return deploy.export_bundle(Tiny().eval(), None, Settings(**settings), bundle, arch="Tiny", **KNOWN)  # type: ignore


def test_it_is_found_asked_for_and_written_after_what_it_needs(folder: Path) -> None:
    def names(**settings: bool) -> list[str]:
        return [target.name for target in targets.asked(Settings(**{"onnx": False, **settings}))]

    assert names() == [] and names(coreml=True) == ["onnx", "coreml"]
    assert names(coreml=True, torch=True, fp16=True) == ["onnx", "coreml", "onnx_fp16", "torch"]
    assert names(trt=True, int8=True) == ["onnx", "onnx_int8", "onnx_int8_trt", "tensorrt", "tensorrt_int8"]
    assert names(triton=True) == ["onnx"]


def test_what_no_setting_asks_for_is_refused(folder: Path) -> None:
    with pytest.raises(ExportError, match="is asked for by 'coreml', which is no setting"):
        targets.asked(ExportSettings())


def test_what_it_needs_must_be_there(folder: Path) -> None:
    (folder / "to_coreml.py").write_text(COREML.replace('NEEDS = ("onnx",)', 'NEEDS = ("onx",)'))
    with pytest.raises(ExportError, match="needs 'onx', which is no export target: coreml, onnx"):
        targets.known()
    (folder / "to_coreml.py").write_text(COREML.replace('NEEDS = ("onnx",)', 'NEEDS = ("aml",)'))
    (folder / "to_aml.py").write_text(COREML.replace('NEEDS = ("onnx",)', 'NEEDS = ("coreml",)'))
    with pytest.raises(ExportError, match="aml, coreml"):
        targets.known()


def test_the_whole_road(folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    verification = export(bundle, onnx=False, coreml=True, batch_sizes=[])
    rows = {row["name"]: row for row in verification["rows"]}
    assert list(rows) == ["torch", "onnx", "coreml"] and verification["verdict"] == "parity_only"
    assert rows["coreml"]["pass"] and rows["coreml"]["file"] == "model.mlpackage"
    assert (rows["coreml"]["precision"], rows["coreml"]["provider"]) == ("fp16", "CoreML")
    assert rows["coreml"]["mb"] == pytest.approx(rows["onnx"]["mb"] + 3e-6)
    assert verification["exports"]["coreml"] == {"made_of": "model.onnx"}
    assert verification["environment"]["yaml"] == yaml.__version__
    card = (bundle / "README.md").read_text()
    for name in ("model.mlpackage", "model.mlpackage.json", "to_coreml.py"):
        assert f"- `{name}`: " in card and (bundle / name).exists()
    assert deploy.check_sums(bundle) == []
    assert [row["name"] for row in deploy.verify_bundle(bundle, None, Settings(batch_sizes=[]))["rows"]] == [*rows][1:]

    report = benchmark.benchmark(bundle, device="cpu", compiled=False, batch_sizes=[1])
    formats = {row["format"]: row for row in report["rows"]}
    assert formats["coreml"]["status"].startswith("ok") and formats["coreml"]["latency"][0]["p50_ms"] > 0
    assert formats["coreml on elsewhere"]["status"].startswith("unavailable")
    assert formats["onnx_fp16"]["status"].endswith("okdc export RUN --onnx --coreml --fp16")


def test_further_devices_are_runners_of_the_same_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    files = {name: Exported(Path(name), targets.find(name).module) for name in ("onnx", "coreml", "onnx_fp16")}
    found = {row: (each.path.name, each.device, each.tolerance) for row, each in further(files, "cuda").items()}
    assert found == {
        "onnx on cuda": ("onnx", "cuda", None),
        "onnx on tensorrt": ("onnx", "tensorrt", 5e-3),
        "coreml on elsewhere": ("coreml", "elsewhere", None),
    }
    assert not further({name: replace(each, problem="it could not be written") for name, each in files.items()}, "cuda")


def test_one_that_fails_goes_with_everything_it_wrote(folder: Path, tmp_path: Path) -> None:
    (folder / "to_coreml.py").write_text(COREML.replace('write_text("1.0")', 'write_text("2.0")'))
    verification = export(tmp_path / "bundle", coreml=True, batch_sizes=[])
    row = verification["rows"][-1]
    assert row["name"] == "coreml" and not row["pass"] and "logits differ" in row["reason"]
    left = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert "model.onnx" in left and not [name for name in left if name.startswith("model.mlpackage")]
    assert "so it is not in this folder" in (tmp_path / "bundle" / "README.md").read_text()


def test_predict_runs_a_file_that_says_so(folder: Path, tmp_path: Path) -> None:
    (folder / "to_coreml.py").write_text(PLAIN)
    export(tmp_path / "bundle", onnx=False, coreml=True, batch_sizes=[])
    predict = shipped.load(tmp_path / "bundle" / "predict.py")
    assert predict.load(tmp_path / "bundle").file == "model.coreml"
    assert not (tmp_path / "bundle" / "model.onnx").exists()


def test_a_bundle_stays_where_nothing_that_was_asked_for_can_be_written(folder: Path, tmp_path: Path) -> None:
    (folder / "to_coreml.py").write_text(PLAIN.replace("return None", 'return "Type: pip install coreml"'))
    export(tmp_path / "bundle", batch_sizes=[])
    before = (tmp_path / "bundle" / "SHA256SUMS").read_text()
    assert deploy.unavailable(Settings(onnx=False, coreml=True)) == {"coreml": "Type: pip install coreml"}
    with pytest.raises(ExportError, match=r"coreml: Type: pip install coreml\. .*bundle is left as it was"):
        export(tmp_path / "bundle", onnx=False, coreml=True, batch_sizes=[])
    assert (tmp_path / "bundle" / "SHA256SUMS").read_text() == before and deploy.check_sums(tmp_path / "bundle") == []


COMMANDS = """
import json, sys
from click.testing import CliRunner
from okdc.cli import main

done = [CliRunner().invoke(main, [*words.split(), "--batch-sizes", ""]) for words in sys.argv[1:]]
print(json.dumps([[each.exit_code, " ".join(each.stderr.split())] for each in done]))
"""


def test_the_command_line_with_one_file_and_one_setting_more(tmp_path: Path) -> None:
    """A checkout with them: what is asked for and missing is said, with exit code 2, and the rest is written."""
    for name in ("okdc", "export", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    (tmp_path / "export" / "to_coreml.py").write_text(COREML)
    sections, before = tmp_path / "okdc" / "recipe" / "sections.py", "    trt: bool = _setting("
    text = sections.read_text()
    assert text.count(before) == 1
    sections.write_text(text.replace(before, f'    coreml: bool = _setting(False, "write model.mlpackage")\n{before}'))
    words = "compress --model test_resnet --method baseline --data digits --img-size 32 --epochs 1 --experiment run"
    command = [sys.executable, "-c", COMMANDS, f"{words} --no-onnx --coreml", "export runs/run --no-onnx --coreml"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COREML_MISSING": "Type: pip install coreml"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    for code, said in json.loads(done.stdout.splitlines()[-1]):
        assert code == 2 and "no coreml file was written: Type: pip install coreml" in said
    bundle = {path.name for path in (tmp_path / "runs" / "run" / "export").iterdir()}
    assert {"to_coreml.py", "model.onnx"} <= bundle, "with which it is made on the device"
