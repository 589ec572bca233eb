"""What okdc doctor says of this machine, and of machines that are made up where this one lacks what they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from okdc.cli import main
from okdc.deploy import runtimes
from okdc.measure import doctor
from okdc.measure.doctor import Finding, examine
from okdc.system import shipped


def test_this_machine_is_examined_and_told_as_json() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = {each["name"]: each for each in json.loads(result.stdout)}
    assert found["torch"]["found"] == torch.__version__.partition("+")[0] and found["torch"]["ok"]
    runtime = next(each for name, each in found.items() if name.startswith("onnxruntime"))
    assert "CPUExecutionProvider" in runtime["found"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert f"{cores} cores" in found["processor"]["found"]


def of(findings: Iterator[Finding], name: str) -> Finding:
    return next(each for each in findings if each.name == name)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with NVIDIA's driver, and its tool on the path."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_a_gpu_that_torch_cannot_use_is_to_be_mended(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    found = of(doctor._gpus(False), "GPU")
    assert found.ok is False and "580.65.06" in found.found and "build for CUDA" in found.advice
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "older CUDA" in of(doctor._gpus(False), "GPU").advice


def test_a_provider_that_does_not_load_names_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "[E:onnxruntime] Failed to load library libonnxruntime_providers_cuda.so: CUDA libcudnn.so.9: no such file"
    told = '{"CUDAExecutionProvider": false, "CPUExecutionProvider": true}'
    code = f"import sys; print({told!r}); print({said!r}, file=sys.stderr)"
    monkeypatch.setattr(doctor, "_PROVIDERS", code)
    found = of(doctor._providers("onnxruntime-gpu", True), "CUDAExecutionProvider")
    assert found.ok is False and "libcudnn.so.9" in found.found and "onnxruntime-gpu[cuda,cudnn]" in found.advice
    assert of(doctor._providers("onnxruntime-gpu", False), "CUDAExecutionProvider").ok is None  # no GPU: no fault


def test_tensorrt_for_rtx_is_told_with_what_it_can_do_here(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = shipped.load(shipped.folder("export") / "to_tensorrt_rtx.py")
    monkeypatch.setattr(doctor, "_version", lambda package: "1.7.1")
    monkeypatch.setattr(builder, "available", lambda: None)
    found = of(doctor._runtimes(False), "TensorRT for RTX")
    assert found.ok and "1.7.1, builds engines for RTX GPUs; " in found.found
    monkeypatch.setattr(builder, "available", lambda: "TensorRT for RTX cannot be loaded (no x.so): pip install it")
    found = of(doctor._runtimes(False), "TensorRT for RTX")
    assert (found.ok, found.found, found.advice) == (
        False, "TensorRT for RTX cannot be loaded (no x.so)", "pip install it"
    )  # fmt: skip
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    found = of(doctor._runtimes(False), "TensorRT for RTX")
    assert found.ok is None and found.found == "not installed" and "okdc[rtx]" in found.advice


def test_every_runtime_is_named_with_what_to_type_where_it_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no node
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {each.name: each for each in doctor._others()}
    assert found.keys() == runtimes.known().keys() >= {"openvino", "opencv", "onnxruntime_web", "onnxruntime_rtx"}
    for each in found.values():
        assert each.ok is None and "not installed" in each.found and "install" in each.advice, each
    assert "Node.js" in found["onnxruntime_web"].advice


def test_two_onnxruntimes_and_too_many_threads_are_to_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "1.22.0")
    assert "pip uninstall onnxruntime onnxruntime-gpu" in of(doctor._runtimes(False), "onnxruntime").advice
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    code = f"import torch; torch.set_num_threads({2 * cores}); from okdc.measure import doctor; "
    code += "print(next(f for f in doctor._room() if f.name == 'processor').advice)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"export OMP_NUM_THREADS={cores}" in told.stdout


def test_the_table_says_how_much_there_is_to_mend(capsys: pytest.CaptureFixture[str]) -> None:
    from okdc.cli.tables import show_findings

    show_findings([Finding("disk", "1 GiB free", False, "Use [another] disk."), Finding("GPU", "none", None)])
    shown = capsys.readouterr().out
    assert "Use [another] disk." in shown and "1 to mend." in shown


def test_nothing_is_missing_that_examining_needs() -> None:
    assert all(isinstance(each.found, str) and each.found for each in examine())
