"""The TensorRT target, as far as a machine can tell: names and pure parts everywhere, on a GPU the real thing."""

from __future__ import annotations

import ast
import contextlib
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
import onnx
import pytest
import torch

from okdc.deploy import targets
from okdc.deploy.bundle import check_sums, listed, refuse_foreign, write_sums
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
GPU = engines.gpu_of  # which the fake replaces
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


# ---- contract: the names of three versions, the behaviours that were recorded, and onnxruntime's arithmetic


@pytest.fixture(params=NAMES)
def trt(request, monkeypatch):
    return fake_tensorrt.pretend(monkeypatch, request.param)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    folder, network = tmp_path_factory.mktemp("contract"), tiny()
    targets.find("onnx").module.write(network, EXAMPLE, folder / "model.onnx")
    return network, folder / "model.onnx"


def build(onnx_file, folder, **options):
    source = folder / "model.onnx"
    source.write_bytes(onnx_file[1].read_bytes())
    return to_tensorrt.write(
        None, None, folder / "model.engine", onnx=source, timing_cache=folder / "timing", **options
    )


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_contract_an_engine_is_built_and_gives_the_logits_of_its_onnx(trt, onnx_file, tmp_path, cuda_graph):
    facts = build(onnx_file, tmp_path, profile=(1, 2, 4), workspace=1 << 20)
    assert facts["precisions"] == {"fp32": 1} and facts["tensorrt"] == trt.__version__ and facts["gpu"] == "H100"
    typed = 0 if trt.__version__.startswith("11") else 1 << 1
    told = trt.plan.told
    assert ("flags", typed) in told and ("WORKSPACE", 1 << 20) in told and ("clear", "TF32") in told
    assert facts["profile"] == {"input": [[n, 3, 32, 32] for n in (1, 2, 4)]}
    assert facts["onnx_sha256"] == hashlib.sha256(onnx_file[1].read_bytes()).hexdigest()
    run = to_tensorrt.runner(tmp_path / "model.engine", device="cuda", cuda_graph=cuda_graph)
    assert_same(run, onnx_file[0], limit=1e-5)  # batches of 1, 3 and 5: the last one is split
    assert run.provider == f"TensorRT {trt.__version__} on H100"
    batches = [batch for what, batch, *_ in trt.plan.told if what == "execute"]
    assert max(batches) == 4 and len(batches) >= 4


def test_contract_an_engine_is_built_for_the_gpu_that_is_asked_for(trt, onnx_file, tmp_path, monkeypatch):
    told = trt.plan.told

    @contextlib.contextmanager
    def current(gpu):
        told.append(("current", str(gpu)))
        yield
        told.append(("current", "as before"))

    monkeypatch.setattr(engines, "gpu_of", GPU)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "get_device_name", "the {}".format)
    facts = build(onnx_file, tmp_path, device="cuda:1")
    flags = next(i for i, (what, *_) in enumerate(told) if what == "flags")
    assert told.index(("current", "cuda:1")) < flags < told.index(("current", "as before"))
    assert facts["gpu"] == "the cuda:1" and engines.gpu_of("cpu") == torch.device("cuda:0")


def test_contract_the_timing_cache_is_kept_and_one_that_does_not_fit_is_dropped(trt, onnx_file, tmp_path):
    build(onnx_file, tmp_path)
    assert (tmp_path / "timing").read_bytes() == b"timings"
    trt.plan.cache_fits = False
    build(onnx_file, tmp_path)
    assert [entry for entry in trt.plan.told if entry[0] == "cache"] == [
        ("cache", b"", True), ("cache", b"timings", False), ("cache", b"", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("planned", "said"),
    [
        (
            {"errors": ["zero point is not supported"]},
            r"cannot parse .*zero point is not supported \(node 'node_7', Cast",
        ),
        ({"add": -1}, r"refuses profile=\(1, 8, 32\)"),
        ({"build": "Dimension mismatch for tensor input and profile 0"}, "cannot build model.onnx: Dimension mismatch"),
        ({"load": "cudaError 35"}, "cannot load the engine just built: cudaError 35"),
        ({"memory": False}, "not enough GPU memory"),
        ({"built": "HALF"}, "asks for fp32 layers, and TensorRT built an engine with fp16"),
    ],
)
def test_contract_every_refusal_is_a_sentence_and_leaves_no_engine(trt, onnx_file, tmp_path, planned, said):
    vars(trt.plan).update(planned)
    trt.plan.errors = [
        SimpleNamespace(desc=lambda text=text: text, node_name=lambda: "node_7", node_operator=lambda: "Cast")
        for text in trt.plan.errors
    ]
    with pytest.raises(RuntimeError, match=said):
        build(onnx_file, tmp_path)
    assert not (tmp_path / "model.engine").exists() and not (tmp_path / "model.engine.json").exists()


@pytest.mark.parametrize("profile", [(8, 1, 32), (1, 8, 4)])
def test_contract_a_profile_that_makes_no_sense(trt, onnx_file, tmp_path, profile):
    with pytest.raises(RuntimeError, match=r"such as \(1, 8, 32\)"):
        build(onnx_file, tmp_path, profile=profile)


def test_contract_what_goes_wrong_when_running_is_told(trt, onnx_file, tmp_path):
    build(onnx_file, tmp_path)
    run = to_tensorrt.runner(tmp_path / "model.engine")
    with pytest.raises(RuntimeError, match="takes images from"):
        run(np.zeros((1, 3, 48, 48), dtype=np.float32))
    trt.plan.enqueue = False
    with pytest.raises(RuntimeError, match="did not run the engine"):
        run(np.zeros((1, 3, 32, 32), dtype=np.float32))


def test_contract_a_graph_is_of_one_shape(trt, onnx_file, tmp_path):
    build(onnx_file, tmp_path)
    run = to_tensorrt.runner(tmp_path / "model.engine", cuda_graph=True)
    assert run(np.zeros((2, 3, 32, 32), dtype=np.float32)).shape == (2, 7)
    with pytest.raises(RuntimeError, match="takes images from"):
        run(np.zeros((2, 1, 32, 32), dtype=np.float32))


def test_contract_an_engine_that_is_built_in_a_bundle_belongs_to_it(trt, onnx_file, tmp_path, monkeypatch, capsys):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model.onnx").write_bytes(onnx_file[1].read_bytes())
    for part in PARTS:
        shutil.copyfile(part, bundle / part.name)
    served = bundle / "triton" / "tiny_tensorrt" / "1" / "model.plan"
    served.parent.mkdir(parents=True)
    served.write_bytes(b"an engine of another machine")
    write_sums(bundle)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["to_tensorrt.py", str(bundle / "model.onnx")])
    monkeypatch.syspath_prepend(bundle)  # as of the file that `python` is given
    promised = 32
    for _ in range(2):  # built, and built again for another machine
        runpy.run_path(str(bundle / "to_tensorrt.py"), run_name="__main__")
        built = {"model.engine", "model.engine.json", "triton/tiny_tensorrt/1/model.plan"}
        assert set(listed(bundle)) == {"model.onnx", *(part.name for part in PARTS), *built}
        assert check_sums(bundle) == [] and served.read_bytes() == (bundle / "model.engine").read_bytes()
        refuse_foreign(bundle)
        sidecar = json.loads((bundle / "model.engine.json").read_text())
        ((smallest, usual, largest),) = sidecar["profile"].values()
        assert [smallest[0], usual[0], largest[0]] == [1, 8, promised]
        largest[0] = promised = 64  # what a server was promised by the machine that exported, it gets
        (bundle / "model.engine.json").write_text(json.dumps(sidecar))
    assert [path.name for path in (tmp_path / "cache" / "okdc").iterdir()] == [
        f"tensorrt-{trt.__version__}-sm9.0.timing"
    ]


def test_without_a_cache_folder_timings_are_kept_at_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = to_tensorrt._default_cache(HERE)
    assert cache == tmp_path / ".cache" / "okdc" / "tensorrt-11.4.0.106-sm9.0.timing"
    assert to_tensorrt._default_cache(HERE | {"compute_capability": "8.9"}) != cache


def test_contract_a_name_promises_a_precision(trt, onnx_file, tmp_path):
    source = tmp_path / "model.fp16.onnx"
    source.write_bytes(onnx_file[1].read_bytes())  # float32 in truth
    options = {"onnx": source, "timing_cache": tmp_path / "timing"}
    with pytest.raises(RuntimeError, match="asks for fp16 layers, and TensorRT built an engine with fp32"):
        to_tensorrt.write(None, None, tmp_path / "model.fp16.engine", **options)
    to_tensorrt.write(None, None, tmp_path / "model.engine", **options)
    for end in ("", ".json"):
        (tmp_path / f"model.engine{end}").rename(tmp_path / f"model.fp16.engine{end}")
    with pytest.raises(RuntimeError, match="no layer in the precision of its name"):
        to_tensorrt.runner(tmp_path / "model.fp16.engine")


def test_contract_the_precision_is_the_graphs(trt, onnx_file, tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    source, engine = tmp_path / "model.fp16.onnx", tmp_path / "model.fp16.engine"
    onnx.save(convert_float_to_float16(onnx.load(onnx_file[1]), keep_io_types=True), source)
    facts = to_tensorrt.write(None, None, engine, onnx=source, timing_cache=tmp_path / "timing")
    assert set(facts["precisions"]) == {"fp16", "fp32"}
    assert_same(to_tensorrt.runner(engine), onnx_file[0], limit=1e-2)
    trt.plan.built = "FLOAT"
    with pytest.raises(RuntimeError, match="asks for fp16 layers, and TensorRT built an engine with fp32"):
        to_tensorrt.write(None, None, engine, onnx=source, timing_cache=tmp_path / "timing")


def test_contract_the_onnx_beside_must_be_the_one_it_was_built_from(trt, onnx_file, tmp_path):
    build(onnx_file, tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"another")
    with pytest.raises(RuntimeError, match=r"built from another model\.onnx"):
        to_tensorrt.runner(tmp_path / "model.engine")
    (tmp_path / "model.onnx").unlink()
    assert_same(to_tensorrt.runner(tmp_path / "model.engine"), onnx_file[0], limit=1e-5)


@pytest.mark.parametrize("version", NAMES)
def test_contract_the_fake_knows_no_name_that_the_version_has_not(version):
    package = fake_tensorrt.Package(version, fake_tensorrt.Plan())
    removed = [
        lambda: package.IInt8EntropyCalibrator2,
        lambda: package.Builder(None).create_builder_config().max_workspace_size,
        lambda: setattr(package.Builder(None).create_builder_config(), "int8_calibrator", None),
        lambda: package.NetworkDefinitionCreationFlag.EXPLICIT_BATCH,
        lambda: package.BuilderFlag.FP16,
    ]
    gone = removed if version.startswith("11") else removed[:2]
    for use in gone:
        with pytest.raises(AttributeError):
            use()


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
