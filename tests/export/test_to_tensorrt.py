"""The TensorRT target, as far as a machine can tell: names and pure parts everywhere, on a GPU the real thing."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from okdc.deploy import targets
from tests.export import fake_tensorrt
from tests.helpers.exported import EXAMPLE, assert_same, tiny

to_tensorrt = targets.find("tensorrt").module
building, engines = (to_tensorrt._beside(name) for name in ("tensorrt_build", "tensorrt_engine"))
SOURCE = Path(to_tensorrt.__file__)
PARTS = [SOURCE, *(SOURCE.with_name(name) for name in to_tensorrt.BESIDE)]
# Public names of the tensorrt bindings by version, read from the real packages (dir() of each class).
NAMES = fake_tensorrt.NAMES
# What the variables of its parts that hold TensorRT objects are.
OBJECTS = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "_runtime": "Runtime", "engine": "ICudaEngine",
    "_engine": "ICudaEngine", "context": "IExecutionContext", "_context": "IExecutionContext",
    "inspector": "EngineInspector", "layer": "ILayer", "tensor": "ITensor",
}  # fmt: skip
REASON = to_tensorrt.available()
HERE = {"tensorrt": "11.4.0.106", "compute_capability": "9.0", "gpu": "NVIDIA H100"}


def used() -> set[tuple[str, str]]:
    """(class, attribute) of every TensorRT name in the files; the class "module" is tensorrt itself."""
    found = set()
    for node in (node for part in PARTS for node in ast.walk(ast.parse(part.read_text()))):
        if not isinstance(node, ast.Attribute):
            continue
        owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", None)
        if owner in ("trt", "tensorrt"):
            found.add(("module", node.attr))
        elif isinstance(node.value, ast.Attribute) and getattr(node.value.value, "id", None) == "trt":
            found.add((node.value.attr, node.attr))
        elif owner in OBJECTS and not (owner in ("layer", "tensor") and node.attr == "get"):  # dicts of the inspector
            found.add((OBJECTS[owner], node.attr))
    return {(owner, name) for owner, name in found if not name.startswith("__")}


@pytest.mark.parametrize("version", NAMES)
def test_every_name_is_in_the_package(version):
    names = used()
    assert {owner for owner, _ in names} >= {"module", *OBJECTS.values()}
    assert not {(owner, name) for owner, name in names if name not in NAMES[version].get(owner, ())}
    for method in re.findall(r"error\.(\w+)\(\)", PARTS[1].read_text()):
        assert method in NAMES[version]["ParserError"]
    for kind in building.NETWORK_TYPES:
        assert kind in NAMES[version]["DataType"]


def test_the_name_lists_tell_versions_apart():
    assert "FP16" in NAMES["10.16.1.11"]["BuilderFlag"] and "FP16" not in NAMES["11.0.0.114"]["BuilderFlag"]


def test_without_tensorrt_one_sentence(monkeypatch, capsys):
    if REASON is None:
        pytest.skip("tensorrt and a CUDA device are here")
    assert REASON.count("\n") == 0 and re.search("python to_tensorrt.py|pip install", REASON)
    with pytest.raises(RuntimeError, match=re.escape(REASON)):
        to_tensorrt.write(None, None, Path("never.engine"), onnx="model.onnx")
    with pytest.raises(RuntimeError, match=re.escape(REASON)):
        to_tensorrt.runner("never.engine")
    monkeypatch.setattr(sys, "argv", ["to_tensorrt.py", "model.onnx"])
    monkeypatch.syspath_prepend(SOURCE.parent)  # as of the file that `python` is given
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SOURCE), run_name="__main__")
    assert ended.value.code == 2 and capsys.readouterr().err == f"{REASON}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("target", "source"), [("tensorrt_fp16", "fp16.onnx"), ("tensorrt_int8", "int8.trt.onnx")])
def test_the_command_to_type_names_the_onnx_of_its_precision(target, source):
    sentence = targets.find(target).module.available()
    assert sentence.endswith(f"type there: python to_tensorrt.py model.{source}") and sentence.count(source) == 2


def test_a_copy_without_its_parts_says_what_is_missing(tmp_path):
    shutil.copyfile(SOURCE, tmp_path / SOURCE.name)
    told = subprocess.run([sys.executable, tmp_path / SOURCE.name, "model.onnx"], capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (
        2, "to_tensorrt.py needs tensorrt_engine.py beside it: copy that from the bundle, too.\n"
    )  # fmt: skip


def test_loads_without_torch_or_tensorrt():
    code = f"import sys, runpy; runpy.run_path({str(SOURCE)!r}); assert not {{'torch', 'tensorrt'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("text", "version"), [("10.16.1.11", (10, 16)), ("11.4.0.106", (11, 4)), ("10.9.0", (10, 9))])
def test_version(text, version):
    assert engines.version(text) == version
    assert (version < to_tensorrt._OLDEST) == (text == "10.9.0")


def test_parser_errors_name_the_node():
    error = SimpleNamespace(desc=lambda: "zero point", node_name=lambda: "node_7", node_operator=lambda: "Cast")
    text = building.parser_errors(Path("model.onnx"), [error])
    assert text == "TensorRT cannot parse model.onnx: zero point (node 'node_7', Cast)."


def layer(*formats: str, weights: str = "") -> dict:
    tensors = [{"Name": "x", "Format/Datatype": text} for text in formats]
    return {"Name": "conv", "Inputs": tensors[:1], "Outputs": tensors[1:], "Weights": {"Type": weights, "Count": 9}}


def test_precisions_are_read_from_the_inspector():
    layers = [
        layer("Row major linear FP32", "Channel major FP16 format where channel % 4 == 0"),
        layer("Half", "Half", weights="Half"),
        layer("Thirty-two wide channel vectorized row major Int8 format.", "Int8", weights="Int8"),
        layer("Float", "Float", weights="Float"),
        {"Name": "nothing told"},
    ]
    assert engines.layer_precisions(json.dumps({"Layers": layers})) == {"fp16": 2, "fp32": 2, "int8": 1}
    with pytest.raises(RuntimeError, match="does not tell its precisions"):
        engines.layer_precisions(json.dumps({"Layers": ["conv1 + relu"]}))


@pytest.mark.parametrize(
    ("asked", "built", "message"),
    [
        ({"fp32", "fp16"}, {"fp32": 50}, "asks for fp16 layers, and TensorRT built an engine with fp32"),
        ({"fp32"}, {"fp32": 3, "fp16": 40}, "asks for fp32 layers, and TensorRT built an engine with fp16"),
        ({"fp32", "int8"}, {"fp32": 3, "fp16": 40}, "asks for int8 layers"),
        ({"fp32"}, {}, "names no precision"),
        ({"fp32"}, {"fp32": 50}, None),
        ({"fp32", "int8", "fp16"}, {"int8": 20, "fp16": 9}, None),
    ],
)
def test_wrong_precision_is_an_error(asked, built, message):
    if message is None:
        return to_tensorrt._check_precisions(asked, built)
    with pytest.raises(RuntimeError, match=message):
        to_tensorrt._check_precisions(asked, built)


def engine_file(folder: Path, **changed: str) -> Path:
    path = folder / to_tensorrt.FILE
    path.write_bytes(b"plan")
    sidecar = HERE | {"onnx": "model.onnx", "engine_sha256": hashlib.sha256(b"plan").hexdigest()} | changed
    (folder / "model.engine.json").write_text(json.dumps(sidecar))
    return path


def test_engine_of_this_machine_is_read(tmp_path):
    assert to_tensorrt._read_engine(engine_file(tmp_path), HERE) == b"plan"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tensorrt": "10.16.1.11"}, "is for tensorrt 10.16.1.11, and here it is 11.4.0.106"),
        ({"compute_capability": "8.9"}, "is for compute_capability 8.9, and here it is 9.0"),
        ({"gpu": "NVIDIA H200"}, "is for gpu NVIDIA H200, and here it is NVIDIA H100"),
        ({"engine_sha256": "0"}, "is not the engine that its model.engine.json describes"),
    ],
)
def test_engine_of_another_machine_is_refused(tmp_path, changed, message):
    with pytest.raises(RuntimeError, match=message) as caught:
        to_tensorrt._read_engine(engine_file(tmp_path, **changed), HERE)
    assert str(caught.value).endswith(f"Build it here: python {SOURCE} {tmp_path / 'model.onnx'}")


@pytest.mark.parametrize("missing", ["model.engine", "model.engine.json"])
def test_engine_without_its_sidecar_is_refused(tmp_path, missing):
    path = engine_file(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(RuntimeError, match=r"cannot be read.*Build it here"):
        to_tensorrt._read_engine(path, HERE)


def test_without_a_cache_folder_timings_are_kept_at_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = to_tensorrt._default_cache(HERE)
    assert cache == tmp_path / ".cache" / "okdc" / "tensorrt-11.4.0.106-sm9.0.timing"
    assert to_tensorrt._default_cache(HERE | {"compute_capability": "8.9"}) != cache


# ---- the real thing


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A network and the folder of its engines, with the facts of each by its target."""
    if REASON is not None:
        if os.environ.get("OKDC_REQUIRE_TRT") == "1":
            pytest.fail(f"OKDC_REQUIRE_TRT=1, but: {REASON}")
        pytest.skip(REASON)
    folder = tmp_path_factory.mktemp("tensorrt")
    network, source = tiny(), folder / "model.onnx"
    targets.find("onnx").module.write(network, EXAMPLE, source)
    calibration = np.random.default_rng(0).standard_normal((16, 3, 32, 32), dtype=np.float32)
    options = {"profile": (1, 3, 4), "timing_cache": folder / "timing"}
    facts = {"tensorrt": to_tensorrt.write(None, None, folder / to_tensorrt.FILE, onnx=source, **options)}
    for name, before in {"tensorrt_fp16": "onnx_fp16", "tensorrt_int8": "onnx_int8_trt"}.items():
        target, given = targets.find(name).module, folder / targets.find(before).module.FILE
        targets.find(before).module.write(None, None, given, onnx=source, calibration=calibration)
        facts[name] = target.write(None, None, folder / target.FILE, **{before: given}, profile=(1, 3, 4))
    return network, folder, facts


@pytest.mark.cuda
@pytest.mark.tensorrt
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize(
    ("name", "precision", "limit"),
    [("tensorrt", "fp32", 1e-4), ("tensorrt_fp16", "fp16", 1e-2), ("tensorrt_int8", "int8", 0.3)],
)
def test_engine_equals_torch(built, cuda_graph, name, precision, limit):
    network, folder, facts = built
    target = targets.find(name).module
    run = target.runner(folder / target.FILE, device="cuda", cuda_graph=cuda_graph)
    assert run.provider.startswith("TensorRT") and run.precisions == facts[name]["precisions"]
    assert set(run.precisions) - {"fp32"} == {precision} - {"fp32"}
    assert_same(run, network.cpu(), limit=limit)  # no TF32; the batch of five is split, as the profile ends at four
    images = torch.randn(2, 3, 32, 32, device="cuda")
    assert np.allclose(run.infer(images).cpu().numpy(), run(images.cpu().numpy()), atol=1e-6)


@pytest.mark.cuda
@pytest.mark.tensorrt
def test_second_build_uses_the_timing_cache(built):
    _, folder, _ = built
    source, cache = folder / "model.onnx", folder / "timing"
    assert cache.stat().st_size > 0
    again = to_tensorrt.write(None, None, folder / "again.engine", onnx=source, timing_cache=cache)
    assert again["onnx"] == "model.onnx"


@pytest.mark.cuda
@pytest.mark.tensorrt
def test_image_of_another_size_is_refused(built):
    run = to_tensorrt.runner(built[1] / to_tensorrt.FILE, device="cuda")
    with pytest.raises(RuntimeError, match="takes images from"):
        run(np.zeros((1, 3, 48, 48), dtype=np.float32))


@pytest.mark.cuda
@pytest.mark.tensorrt
def test_bad_onnx_is_a_sentence(built, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    with pytest.raises(RuntimeError, match="cannot parse"):
        to_tensorrt.write(None, None, tmp_path / "m.engine", onnx=tmp_path / "bad.onnx")


def test_the_gpu_is_asked_for_before_tensorrt_is_imported():
    """Its runtime ends the process when there is no device, so importing it must never come first."""
    body = next(node for node in ast.parse(SOURCE.read_text()).body if getattr(node, "name", None) == "available")
    lines = {ast.unparse(node): node.lineno for node in ast.walk(body) if isinstance(node, (ast.Import, ast.If))}
    asked = next(line for text, line in lines.items() if "cuda.is_available" in text)
    assert asked < lines["import tensorrt"]
