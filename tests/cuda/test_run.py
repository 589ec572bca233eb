"""Whole runs on the GPU: stopped and continued, exported, verified and timed there, and home again afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import okdc
from okdc import pipeline
from okdc.deploy import targets
from okdc.measure import benchmark, step_cost
from okdc.methods import settings as method_settings
from okdc.recipe import resolve
from okdc.verification import latency, torch_runner

FILES = {"onnx": targets.find("onnx").module.available() is None, "torch": True}
DIGITS = {"model": "test_resnet", "data": "digits", "img-size": 32, "workers": 0, "batch-size": 128}


def separable(classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of noise that is brighter in later classes."""
    labels = torch.arange(64) % classes
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 32, 32, generator=draw) / 3 + labels.view(-1, 1, 1, 1).float()
    return list(zip(images.split(16), labels.split(16), strict=True))


def trained(network: nn.Module, folder: Path, device: torch.device, **changes: Any) -> okdc.Result:
    given = {"method": "one", "epochs": 2, "lr": 0.01, "output": folder, "device": str(device), "batch_sizes": [1]}
    return okdc.compress(network, separable(), separable(), **FILES | given | changes)


@pytest.mark.parametrize("home", ["cpu", "there"])
def test_the_student_comes_home_and_every_file_is_verified_on_the_device(
    home: str, device: torch.device, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=4).to("cpu" if home == "cpu" else device)
    where = next(network.parameters()).device
    result = trained(network, tmp_path, device, model_ema=True)
    assert result.student is network and {p.device for p in network.parameters()} == {where}
    assert {p.is_contiguous() for p in network.parameters()} == {True}
    verification = result.verification
    assert verification is not None and verification["verdict"] == "pass", verification["rows"]
    assert verification["device"].startswith(device.type)
    rows = {row["name"]: row for row in verification["rows"]}
    assert rows["torch.export"]["provider"].startswith(device.type) and rows["torch.export"]["rel"] < 1e-4
    assert all(row["latency"][0]["p50_ms"] > 0 for row in rows.values() if row["latency"])


def test_float32_files_are_held_to_a_reference_without_tf32(device: torch.device, tmp_path: Path) -> None:
    target, network = targets.find("torch").module, timm.create_model("resnet18", num_classes=10).eval()
    target.write(network, torch.zeros(2, 3, 64, 64), tmp_path / "model.pt2")
    images = np.random.default_rng(0).standard_normal((8, 3, 64, 64), dtype=np.float32)
    expected = torch_runner(network)(images)
    for run in (torch_runner(network, str(device)), target.runner(tmp_path / "model.pt2", device=str(device))):
        assert np.abs(run(images) - expected).max() / np.abs(expected).max() < 1e-4


def test_a_network_on_the_device_is_exported_as_it_is_on_the_cpu(device: torch.device, tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=4).eval().to(device)
    facts = targets.find("torch").module.write(network, torch.zeros(2, 3, 32, 32), tmp_path / "model.pt2")
    assert facts["dynamic_batch"] and next(network.parameters()).device.type == device.type
    pytest.importorskip("onnxruntime", reason="ONNX is compared with torch by onnxruntime")
    facts = targets.find("onnx").module.write(network, torch.zeros(2, 3, 32, 32), tmp_path / "model.onnx")
    assert facts["rel_error"] < 1e-4 and next(network.parameters()).device.type == device.type


def test_a_run_is_verified_and_timed_again(device: torch.device, tmp_path: Path) -> None:
    result = trained(timm.create_model("test_resnet", num_classes=4), tmp_path, device, onnx=False)
    again = pipeline.verify(result.path / "export", device=str(device), batch_sizes=[1])
    assert again["device"].startswith(device.type) and again["verdict"] == "parity_only"  # without the data
    report = benchmark.benchmark("test_resnet", device=str(device), compiled=True, img_size=32, batch_sizes=[2])
    rows = {row["format"]: row for row in report["rows"]}
    for name in ("torch eager", "torch compiled", "torch.export"):
        assert rows[name]["latency"][0]["p50_ms"] > 0, rows[name]["status"]


def test_latency_is_measured_on_the_device_in_a_process_of_its_own(device: torch.device, tmp_path: Path) -> None:
    target = targets.find("torch").module
    target.write(timm.create_model("test_resnet", num_classes=4), torch.zeros(2, 3, 32, 32), tmp_path / "model.pt2")
    images = np.zeros((2, 3, 32, 32), dtype=np.float32)
    rows = latency.measure_alone(target.__file__, tmp_path / "model.pt2", str(device), images, [1, 2], 1)
    assert [row["batch"] for row in rows] == [1, 2] and all(row["p50_ms"] > 0 for row in rows)


def test_profile_measures_time_and_memory(device: torch.device) -> None:
    flat = {"model": "resnet20_cifar", "num_classes": 10, "method": "ahbf", "device": str(device), "batch_size": 8}
    found = step_cost.profile(resolve(None, flat=flat, method_settings=method_settings), rounds=2)
    assert (found.device == "CPU") == (device.type == "cpu") and len(found.rows) >= 4
    for row in found.rows:
        assert 0 < row.plain.low <= row.plain.high and row.cohort.low > 0 and row.cohort_wall.low > 0
        assert 0 < row.plain_memory < row.cohort_memory


def test_a_run_that_is_stopped_or_killed_goes_on(device: torch.device, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "stopped"
    settings = DIGITS | {"method": "ahbf", "members": 2, "extra-blocks": 0, "device": device, "epochs": 40}
    settings |= {"output": run.parent, "experiment": run.name, "resume": "auto"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "okdc", "compress", *flags, "--no-onnx"]
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(okdc.__file__).parents[1]), *sys.path])}
    done = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(command, env=here, stderr=subprocess.PIPE, text=True) as process:
            end = time.monotonic() + 120
            while epochs(run) <= done and time.monotonic() < end and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL), said
        assert epochs(run) > done, said
        done = epochs(run)
    command[command.index("--epochs") + 1] = str(done + 2)
    finished = subprocess.run(command, env=here, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0 and epochs(run) == done + 2, finished.stderr
    report = json.loads((run / "report.json").read_text())
    assert report["metrics"]["epochs"] == done + 2


def epochs(run: Path) -> int:
    """How many lines of summary.csv are of an epoch that is done."""
    table = run / "summary.csv"
    return max(0, len(table.read_text().splitlines()) - 1) if table.exists() else 0


def test_what_is_saved_beside_the_training_is_what_the_device_had(device: torch.device, tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=4)
    result = trained(network, tmp_path, device, epochs=1, onnx=False, torch=False)
    saved = torch.load(result.path / "last.pth.tar", weights_only=True)  # where they were when they were saved
    assert {value.device.type for value in saved["okdc"]["method"].values() if isinstance(value, torch.Tensor)} == {
        "cpu"
    }
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in network.state_dict().items())
