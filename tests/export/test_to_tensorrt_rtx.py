"""NVIDIA's own parser and builder, without a GPU: what okdc exports is taken, what it cannot take is named by node."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch

from okdc import deploy
from okdc.deploy import targets
from okdc.recipe import ExportSettings
from tests.helpers.exported import tiny

rtx = targets.find("tensorrt_rtx").module
REASON = rtx.available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
KINDS = {"onnx": "fp32", "onnx_fp16": "fp16", "onnx_int8_trt": "int8", "onnx_int8": "int8"}
# Of docs/deployment.md; where the head is no part of the question, narrower.
NETWORKS = {
    "resnet18": {}, "mobilenetv3_small_100": {}, "efficientnet_b0": {}, "vit_tiny_patch16_224": {"img_size": 32},
    "convnext_atto": {}, "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 24},
}  # fmt: skip


def files(network: torch.nn.Module, folder: Path, side: int, *kinds: str) -> dict[str, Path]:
    """The ONNX of a network in each precision."""
    source = folder / "model.onnx"
    targets.find("onnx").module.write(network, torch.zeros(2, 3, side, side), source)
    images = np.random.default_rng(0).standard_normal((8, 3, side, side), dtype=np.float32)
    found = {"onnx": source}
    for name in kinds:
        target = targets.find(name).module
        found[name] = folder / target.FILE
        options = {} if name == "onnx_fp16" else {"enough": 0.0}
        target.write(None, None, found[name], onnx=source, calibration=images, **options)
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files(tiny(), tmp_path_factory.mktemp("rtx"), 32, "onnx_fp16", "onnx_int8_trt", "onnx_int8")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tensorrt_rtx", "onnx"), ("tensorrt_rtx_fp16", "onnx_fp16"), ("tensorrt_rtx_int8", "onnx_int8_trt")],
)
def test_an_engine_is_built_in_the_precision_of_its_graph(
    name: str, kind: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    target = targets.find(name)
    engine = tmp_path / target.file
    facts = target.module.write(None, None, engine, **{kind: exported[kind]}, profile=(1, 2, 4))
    told = json.loads((tmp_path / f"{target.file}.json").read_text())
    assert target.precision == KINDS[kind] and set(target.files) == {path.name for path in tmp_path.iterdir()}
    assert set(told["asked_precisions"]) == {"fp32", KINDS[kind]} and told.items() <= facts.items()
    assert told["engine_sha256"] == sha256(engine.read_bytes()).hexdigest()
    assert told["onnx_sha256"] == sha256(exported[kind].read_bytes()).hexdigest()
    assert told["profile"] == {"input": [[n, 3, 32, 32] for n in (1, 2, 4)]}
    assert all(capability in rtx.DESCRIPTION for capability in told["compute_capabilities"])


def unknown(folder: Path) -> Path:
    """A graph whose only node is of an operator that nobody has."""
    shapes = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 3, 8, 8]) for name in ("input", "logits")]
    node = onnx.helper.make_node("Nonsense", ["input"], ["logits"], name="the_node", domain="elsewhere")
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("elsewhere", 1)]
    graph = onnx.helper.make_graph([node], "odd", shapes[:1], shapes[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), folder / "odd.onnx")
    return folder / "odd.onnx"


def garbage(folder: Path) -> Path:
    (folder / "bad.onnx").write_bytes(b"not onnx")
    return folder / "bad.onnx"


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (garbage, {}, "cannot parse .*Failed to parse the ONNX model"),
        (unknown, {}, r"cannot parse .*\(node 'the_node', Nonsense\)"),
        ("onnx_int8", {}, r"(?s)cannot parse .*\(node '.*_DequantizeLinear', DequantizeLinear\)"),  # of an int32 bias
        ("onnx", {"profile": (8, 1, 32)}, r"refuses profile=\(8, 1, 32\)"),
        ("onnx", {"path": "model.fp16.engine"}, "no layer in the precision that the name model.fp16.engine promises"),
    ],
    ids=["garbage", "operator", "int8 of CPUs", "profile", "name"],
)
def test_what_cannot_be_built_is_said_and_leaves_nothing(
    source: Any, options: dict[str, Any], words: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    given, place = exported[source] if isinstance(source, str) else source(tmp_path), tmp_path / "built"
    place.mkdir()
    options = dict(options)
    with pytest.raises(RuntimeError, match=words):
        rtx.write(None, None, place / options.pop("path", rtx.FILE), onnx=given, **options)
    assert not list(place.iterdir())


def bundle(folder: Path) -> Any:
    settings = ExportSettings(trt_rtx=True, fp16=True, int8=True, batch_sizes=[])
    facts = {"preprocess": timm.data.resolve_data_config({"input_size": (3, 32, 32)}), "classes": tuple("abcdefg")}
    return deploy.export_bundle(tiny(), None, settings, folder, arch="test_resnet", **facts)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_engine_of_a_file_that_failed_is_not_shipped_unjudged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets.find("onnx_fp16").module, "TOLERANCE", 1e-12)
    verification = bundle(tmp_path / "export")
    (told,) = (each["reason"] for each in verification["skipped"] if each["target"] == f"{rtx.ROW}, fp16")
    assert "built and not run here" in told and "model.fp16.onnx, from which it was built, failed its gates" in told
    left = {path.name for path in (tmp_path / "export").iterdir()}
    assert rtx.FILE in left and not {name for name in left if ".fp16." in name}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_bundle_has_the_engine_and_says_that_it_was_not_run(tmp_path: Path) -> None:
    verification = bundle(tmp_path / "export")
    assert (tmp_path / "export" / rtx.FILE).is_file() and verification["verdict"] == "parity_only"
    assert (tmp_path / "export" / "model.fp16.rtx.engine.json").is_file()
    assert {each["target"] for each in verification["skipped"]} >= {rtx.ROW, f"{rtx.ROW}, fp16"}
    (lost,) = (each["reason"] for each in verification["skipped"] if each["target"] == "tensorrt_rtx_int8")
    assert "calibrated on training images, and there are none" in lost
    assert rtx.ROW not in {row["name"] for row in verification["rows"]}
    (told,) = (each["reason"] for each in verification["skipped"] if each["target"] == rtx.ROW)
    assert "model.rtx.engine was built and not run here: torch sees no NVIDIA GPU" in told
    assert (
        verification["exports"]["tensorrt_rtx"]["tensorrt_rtx"] and verification["environment"]["tensorrt_rtx_bindings"]
    )
    assert deploy.not_written(verification, ["trt_rtx"]) is None  # as it was
    card = (tmp_path / "export" / "README.md").read_text()
    assert "built and not run here" in card and "licence of its own" in card
    assert "model.rtx.engine" in (tmp_path / "export" / "SHA256SUMS").read_text()
    assert not [path for path in (tmp_path / "export").rglob("*") if ".so" in path.suffixes]


@pytest.mark.parametrize(
    ("found", "words"),
    [(None, "sees no NVIDIA GPU"), ((9, 0), "8.0, 8.6, 8.9, 12.0, 12.1, and the H100 has 9.0"), ((8, 9), "describes")],
)
def test_an_engine_runs_only_where_it_is_at_home(
    found: tuple[int, int] | None,
    words: str,
    exported: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rtx.write(None, None, tmp_path / rtx.FILE, onnx=exported["onnx"])
    (tmp_path / rtx.FILE).write_bytes(b"another")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    with pytest.raises(RuntimeError, match=words):
        rtx.runner(tmp_path / rtx.FILE, "cuda")


@pytest.mark.rtx
@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_of_the_documentation_are_built_in_every_precision(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, side = timm.create_model(name, num_classes=10, **NETWORKS[name]).eval(), NETWORKS[name].get("img_size", 32)
    for kind, source in files(network, tmp_path, side, "onnx_fp16", "onnx_int8_trt").items():
        facts = rtx.write(None, None, tmp_path / f"{kind}.engine", onnx=source)
        assert set(facts["asked_precisions"]) == {"fp32", KINDS[kind]}
