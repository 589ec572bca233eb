"""TensorRT without a GPU: the names of three versions, the behaviours that were recorded, onnxruntime's arithmetic."""

from __future__ import annotations

import contextlib
import hashlib
import json
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from okdc.deploy import targets
from okdc.deploy.bundle import check_sums, listed, refuse_foreign, write_sums
from tests.export import fake_tensorrt
from tests.export.test_to_tensorrt import NAMES, PARTS, engines, to_tensorrt
from tests.helpers.exported import EXAMPLE, assert_same, tiny

GPU = engines.gpu_of  # which the fake replaces


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
