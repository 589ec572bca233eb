"""A runtime is one file: a made-up one is found, run in a process of its own, judged, told of, and may die there."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import okdc
from okdc import deploy
from okdc.cli import run_commands
from okdc.deploy import runtimes, targets
from okdc.deploy.bundle import write_json, write_sums
from okdc.errors import ExportError
from okdc.measure import benchmark
from okdc.recipe import ExportSettings
from okdc.system import shipped
from okdc.verification import Exported, latency
from okdc.verification.alone import Alone, measure_alone
from okdc.verification.runners import start
from tests.helpers.exported import EXAMPLE, assert_same, tiny
from tests.helpers.networks import Tiny

ROOT = Path(okdc.__file__).parents[1]
KNOWN = {"preprocess": {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}, "classes": tuple("abcd")}
PLAIN = ["torch", "onnx"]

GLASS = """
import os, signal, sys

NAME = "Glass"


def available():
    return os.environ.get("GLASS_MISSING")


def precisions():
    AT_THE_QUESTION
    return ("fp32", "bf16")


def runner(path, device="cpu", threads=None, precision="fp32"):
    import numpy, onnxruntime

    print("Glass says hello")
    assert device == "cpu" and "torch" not in sys.modules
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images):
        logits = session.run(None, {"input": images})[0]
        if precision == "bf16":
            logits = (logits.view("uint32") & 0xFFFF0000).view("float32")
        AT_THE_IMAGES
        return logits

    run.provider = f"Glass 1.0, {precision}"
    return run
"""
DIES = "os.kill(os.getpid(), signal.SIGFPE)"


def glass(at_the_question: str = "pass", at_the_images: str = "pass") -> str:
    return GLASS.replace("AT_THE_QUESTION", at_the_question).replace("AT_THE_IMAGES", at_the_images)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`export/` with one more runtime."""
    copied = Path(shutil.copytree(ROOT / "export", tmp_path / "export", ignore=shutil.ignore_patterns("__pycache__")))
    (copied / "run_glass.py").write_text(glass())
    monkeypatch.setattr(shipped, "folder", lambda name: tmp_path / name)
    return copied


def export(bundle: Path, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    wanted = {"runtimes": ["glass"], "batch_sizes": []} | settings
    return deploy.export_bundle(Tiny().eval(), None, ExportSettings(**wanted), bundle, arch="Tiny", **KNOWN)  # type: ignore


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that was in no runtime."""
    bundle = tmp_path_factory.mktemp("plain") / "bundle"
    export(bundle, runtimes=[])
    return bundle


def rows(verification: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in verification["rows"]}


def test_each_onnx_file_in_each_number_type_is_a_row_judged_as_what_has_fewer_digits(
    folder: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    verification = export(bundle, fp16=True, torch=True)
    found = rows(verification)
    ways = [f"{file} in Glass, {type}" for file in ("onnx", "onnx_fp16") for type in ("fp32", "bf16")]
    assert list(found) == ["torch", "onnx", "onnx_fp16", "torch.export", *ways]
    assert verification["verdict"] == "parity_only" and all(row["pass"] for row in found.values())
    assert [found[way]["precision"] for way in ways] == ["fp32", "bf16", "fp16", "bf16"]
    assert [found[way]["provider"] for way in ways] == ["Glass 1.0, fp32", "Glass 1.0, bf16"] * 2
    assert found[ways[0]]["rel"] < 1e-5 < 1e-4 < found[ways[1]]["rel"] < 1e-2
    assert all(found[way]["runtime"] for way in ways) and found["onnx"]["runtime"] is None
    assert "- `run_glass.py`: " in (bundle / "README.md").read_text() and (bundle / "run_glass.py").exists()
    assert deploy.check_sums(bundle) == []


def test_a_bundle_from_before_there_were_runtimes_is_read_and_timed(folder: Path, plain: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(plain, tmp_path / "bundle"))
    old = json.loads((bundle / "verification.json").read_text()) | {"schema_version": 3}
    for each in (*old["rows"], old["recommended"]):
        del each["runtime"]
    write_json(bundle / "verification.json", old)
    write_sums(bundle)
    report = benchmark.benchmark(bundle, device="cpu", compiled=False, batch_sizes=[1], runtimes=["glass"])
    formats = {row["format"]: row for row in report["rows"]}
    for way in ("onnx", "onnx in Glass, fp32", "onnx in Glass, bf16"):
        assert formats[way]["status"] == "ok" and formats[way]["latency"][0]["p50_ms"] > 0
    assert not (bundle / "run_glass.py").exists(), "nothing in the bundle is changed"


@pytest.mark.parametrize(
    ("faulty", "reason"),
    [
        (glass(at_the_images=DIES), "it does not run: its process died of SIGFPE"),
        (glass(at_the_question=DIES), "it cannot be started: its process died of SIGFPE"),
        (glass(at_the_images="raise ValueError('no such /home/me/kernel')"), "does not run: no such kernel"),
        (glass(at_the_images="logits = logits[:, ::-1]"), "logits differ from torch's"),
    ],
)
def test_a_file_that_goes_wrong_in_a_runtime_fails_there_and_fails_the_check(
    folder: Path, plain: Path, faulty: str, reason: str
) -> None:
    (folder / "run_glass.py").write_text(faulty)
    verification = deploy.verify_bundle(plain, None, ExportSettings(batch_sizes=[], runtimes=["glass"]))
    found = [row for row in verification["rows"] if row["runtime"]]
    assert reason in found[0]["reason"] and verification["verdict"] == "fail"
    assert rows(verification)["onnx"]["pass"] and verification["recommended"]["name"] == "onnx"


@pytest.mark.parametrize(
    ("faulty", "reason", "fails"),
    [
        (glass(at_the_images="os._exit(7)"), "it does not run: its process ended with exit code 7", 2),
        (glass(at_the_images="logits = logits * (precision == 'fp32')"), "logits differ from torch's", 1),
    ],
)
def test_what_a_runtime_cannot_do_stops_no_export(
    folder: Path, tmp_path: Path, faulty: str, reason: str, fails: int
) -> None:
    (folder / "run_glass.py").write_text(faulty)
    verification = export(tmp_path / "bundle")
    bad = [row for row in verification["rows"] if not row["pass"]]
    assert verification["verdict"] == "parity_only" and len(bad) == fails
    assert all(row["runtime"] and reason in row["reason"] for row in bad)
    assert (
        "**fail**: it" in (card := (tmp_path / "bundle" / "README.md").read_text()) and "not in this folder" not in card
    )


def test_a_process_that_dies_on_the_clock_names_its_signal(plain: Path, tmp_path: Path) -> None:
    module, images = tmp_path / "run_glass.py", np.zeros((1, 3, 16, 16), dtype=np.float32)
    module.write_text(glass(at_the_images=DIES))
    with pytest.raises(RuntimeError, match="its process died of SIGFPE"):
        measure_alone(str(module), plain / "model.onnx", "cpu", images, [1], 1, {"precision": "fp32"})


def test_a_runtime_that_is_not_here_is_told_and_ends_with_exit_code_2(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASS_MISSING", "Glass is not installed: pip install glass")
    verification = export(tmp_path / "bundle")
    assert list(rows(verification)) == PLAIN and verification["verdict"] == "parity_only"
    assert {"target": "glass", "reason": "Glass is not installed: pip install glass"} in verification["skipped"]
    with pytest.raises(ExportError, match="nothing was run in glass: Glass is not installed: pip") as caught:
        run_commands.require_asked(verification, {"runtimes": ["glass"]})
    assert caught.value.exit_code == 2
    assert "glass" not in [each.name for each in runtimes.asked(ExportSettings(runtimes=["auto"]))]


def test_a_name_that_is_no_runtimes_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    assert [each.name for each in runtimes.asked(ExportSettings(runtimes=["glass", "glass"]))] == ["glass"]
    with pytest.raises(ExportError, match=r"no runtime 'glas'; okdc has glass, .*auto alone.* Did you mean glass"):
        export(tmp_path / "bundle", runtimes=["glas"])
    assert not (tmp_path / "bundle").exists()


def test_a_file_that_failed_its_own_row_passes_in_no_runtime(folder: Path, tmp_path: Path) -> None:
    text = (folder / "to_onnx_fp16.py").read_text()
    (folder / "to_onnx_fp16.py").write_text(text.replace("TOLERANCE = 1e-2", "TOLERANCE = 1e-9"))
    verification = export(tmp_path / "bundle", fp16=True)
    found = rows(verification)
    assert verification["verdict"] == "parity_only" and not (tmp_path / "bundle" / "model.fp16.onnx").exists()
    assert found["onnx_fp16 in Glass, bf16"]["reason"] == "model.fp16.onnx failed the gates of onnx_fp16"
    assert found["onnx in Glass, bf16"]["pass"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A tiny network, and its model.onnx."""
    network, path = tiny(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    targets.find("onnx").module.write(network, EXAMPLE, path)
    return network, path


@pytest.mark.parametrize(("name", "package"), [("openvino", "openvino"), ("opencv", "cv2")])
def test_the_real_ones_give_what_torch_gives(written: tuple[torch.nn.Module, Path], name: str, package: str) -> None:
    pytest.importorskip(package, reason=f"needs {package}: pip install okdc[{name}]")
    runtime, (network, path) = runtimes.known()[name], written
    assert runtime.module.available() is None and runtime.module.precisions()[0] == "fp32"
    run = Alone(str(runtime.path), path, "cpu", {"precision": "fp32"})
    assert run.provider.startswith(runtime.module.NAME)
    assert_same(run, network)


WEB = runtimes.known()["onnxruntime_web"]
NODE = """#!/usr/bin/env python3
import json, os, struct, sys, time

if sys.argv[2].startswith("require.resolve"):
    sys.exit(os.path.exists("no package"))


def say(**told):
    sys.stdout.buffer.write(json.dumps(told).encode() + b"\\n")


seconds = 0.0
say(web="1.2.3")
sys.stdout.flush()
while sides := sys.stdin.buffer.read(16):
    batch, *rest = struct.unpack("4i", sides)
    sys.stdin.buffer.read(4 * batch * rest[0] * rest[1] * rest[2])
    if batch == 3:
        say(error="no kernel for Resize")
    else:
        seconds += 10.0 * batch
        say(shape=[batch, 2], seconds=seconds)
        sys.stdout.buffer.write(struct.pack(f"{2 * batch}f", *range(2 * batch)))
    sys.stdout.flush()
"""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `node` is found that answers as onnxruntime-web on node does, and counts."""
    (tmp_path / "node").write_text(NODE)
    (tmp_path / "node").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_onnxruntime_web_gives_what_torch_gives(written: tuple[torch.nn.Module, Path]) -> None:
    if reason := WEB.module.available():
        pytest.skip(reason)
    network, path = written
    run = Alone(str(WEB.path), path, "cpu", {"precision": "fp32"})
    assert run.provider.startswith("onnxruntime-web 1.")
    assert_same(run, network)
    with pytest.raises(RuntimeError, match=r"nowhere\.onnx"):
        WEB.module.runner(path.with_name("nowhere.onnx"))


def test_what_node_answers_is_read_and_what_it_says_is_raised(node: Path) -> None:
    run = WEB.module.runner("model.onnx", threads=2)
    assert run.provider == "onnxruntime-web 1.2.3"
    images = np.zeros((2, 3, 4, 5), dtype=np.float32)
    assert run(images).tolist() == [[0, 1], [2, 3]] and run(images[:1]).tolist() == [[0, 1]]
    with pytest.raises(RuntimeError, match="no kernel for Resize"):
        run(np.zeros((3, 3, 4, 5), dtype=np.float32))


def test_the_processor_time_of_another_process_counts(node: Path) -> None:
    """Else a file in a browser's engine would be the fastest of all, and be recommended."""
    run, images = WEB.module.runner("model.onnx"), np.zeros((2, 3, 4, 5), dtype=np.float32)
    assert 20_000 <= latency.measure(run, images, [2], threads=1)[0]["cpu_ms"] < 21_000


def test_what_onnxruntime_web_lacks_is_said(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert WEB.module.available() is None
    (node / "no package").touch()
    assert "npm install onnxruntime-web" in WEB.module.available()
    monkeypatch.setenv("PATH", "")
    assert "install Node.js" in WEB.module.available()


@pytest.mark.parametrize(
    ("able", "precisions"),
    [
        (["FP32", "INT8", "WINOGRAD"], ("fp32",)),
        (["BF16", "FP32", "FP16", "INT8"], ("fp32", "bf16")),  # a server's CPU: bf16 is what it takes by itself
        (["FP32", "FP16"], ("fp32", "fp16")),
    ],
)
def test_openvino_is_asked_what_the_cpu_can(
    able: list[str], precisions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = runtimes.known()["openvino"].module
    monkeypatch.setattr(module, "_core", lambda: SimpleNamespace(get_property=lambda device, name: able))
    assert module.precisions() == precisions


def test_openvino_computes_in_the_number_type_that_is_asked_for(written: tuple[torch.nn.Module, Path]) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install okdc[openvino]")
    module, (_, path) = runtimes.known()["openvino"].module, written
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    exact, short = (module.runner(path, threads=1, precision=each) for each in ("fp32", "bf16"))
    expected = exact(images)
    assert 1e-4 < np.abs(short(images) - expected).max() / np.abs(expected).max() < 5e-2
    assert exact.provider.endswith(", fp32") and short.provider.endswith(", bf16")
    assert np.array_equal(exact(images[:1]), exact(images[:1])) and exact(images[:1]).shape == (1, 7)


SIGNAL_AFTERWARDS = """
import signal, sys
import numpy as np
import run_openvino
images = np.zeros((1, 3, 32, 32), dtype=np.float32)
runs = [run_openvino.runner(sys.argv[1], threads=1) for _ in range(2)]
for run in runs:
    run(images)
del run, runs[0], runs[0]
signal.signal(signal.SIGTERM, lambda *_: print("here"))
signal.raise_signal(signal.SIGTERM)
"""


def test_a_process_outlives_signals_when_two_models_in_openvino_are_gone(written: tuple[torch.nn.Module, Path]) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install okdc[openvino]")
    command, export = [sys.executable, "-c", SIGNAL_AFTERWARDS, written[1]], shipped.folder("export")
    done = subprocess.run(command, cwd=export, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "here\n"), done.stderr


RTX = runtimes.known()["onnxruntime_rtx"]


def test_a_runtime_on_a_gpu_gets_the_files_that_are_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RTX.module.available()
    monkeypatch.setattr(RTX.module, "available", lambda: None)
    wanted = map(targets.find, ("onnx", "onnx_int8", "onnx_int8_trt"))
    exported = {target.row: Exported(Path(target.file), target.module) for target in wanted}
    found = runtimes.rows(exported, ExportSettings(runtimes=["onnxruntime_rtx"]))
    assert list(found) == [f"{name} in {RTX.module.NAME}" for name in ("onnx", "onnx_int8_trt")]
    assert [each.tolerance for each in found.values()] == [5e-3, math.inf]
    if real is not None:  # in a process of its own, which says so
        with pytest.raises(RuntimeError, match=r"not installed|compute capability"):
            start(found[f"onnx in {RTX.module.NAME}"], "cpu")


@pytest.mark.parametrize(
    ("gpus", "said"),
    [([], "and there is none here: "), ([(9, 0)], "and here it is 9.0: "), ([(7, 5), (8, 9)], None), ([(12, 1)], None)],
)
def test_the_provider_of_tensorrt_for_rtx_needs_a_gpu_that_it_takes(
    gpus: list[tuple[int, int]], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="needs NVIDIA's provider: pip install okdc[rtx]")
    monkeypatch.setattr(RTX.module, "_capabilities", lambda: gpus)
    reason = RTX.module.available()
    assert reason is None if said is None else said in reason
    if said:
        with pytest.raises(RuntimeError, match=said):
            RTX.module.runner("model.onnx")


def test_the_provider_of_tensorrt_for_rtx_is_told_its_gpu_and_which_batches_come(
    written: tuple[torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime on the CPU, which claims to be the provider, by the names that the real one has."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="needs NVIDIA's provider: pip install okdc[rtx]")
    network, path = written
    told: dict[str, Any] = {}
    used = [RTX.module._PROVIDER]
    pair = [SimpleNamespace(ep_name=RTX.module._PROVIDER, number=number) for number in (0, 1)]
    for owner, name, value in (
        (RTX.module, "_capabilities", lambda: [(8, 9)]),
        (onnxruntime, "register_execution_provider_library", lambda name, path: told.update({name: Path(path).name})),
        (onnxruntime, "get_ep_devices", lambda: [SimpleNamespace(ep_name="CPUExecutionProvider"), *pair]),
        (onnxruntime.SessionOptions, "add_provider_for_devices", lambda _, gpus, given: told.update(given, gpus=gpus)),
        (onnxruntime.InferenceSession, "get_providers", lambda _: used),
    ):
        monkeypatch.setattr(owner, name, value)
    run = RTX.module.runner(path, "cuda:1")
    assert told["gpus"] == pair[1:] and told[used[0]].endswith("nv_tensorrt_rtx.so")
    assert told["nv_profile_max_shapes"] == "input:32x3x32x32" and run.provider.startswith(used[0])
    images = torch.randn(70, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert np.allclose(run(images.numpy()), network.eval()(images), atol=1e-5)
    with pytest.raises(RuntimeError, match="finds 2 GPUs here, and cuda:2 was asked for"):
        RTX.module.runner(path, "cuda:2")
    used[0] = "CPUExecutionProvider"
    with pytest.raises(RuntimeError, match="fell back to CPUExecutionProvider"):
        RTX.module.runner(path)
