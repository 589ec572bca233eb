"""A network that okdc did not train: what its bundle says of preprocessing is what somebody said, and else nothing."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import timm

import okdc
from okdc import deploy
from okdc.errors import DataError, ExportError, OkdcError
from tests.helpers.networks import Tiny


def test_of_a_module_that_says_nothing_the_bundle_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "export"
    verification = okdc.export(Tiny(), output=bundle, batch_sizes=[], img_size=16)
    assert {"target": "predict.py", "reason": deploy.UNKNOWN} in verification["skipped"]
    assert capsys.readouterr().err.endswith(f"{bundle}: {deploy.UNKNOWN}\n")
    assert not {"predict.py", "preprocess.json"} & {path.name for path in bundle.iterdir()}
    stored = {entry.key: entry.value for entry in onnx.load(bundle / "model.onnx").metadata_props}
    assert json.loads(stored["okdc.preprocess"]) == {"input_size": [3, 16, 16]}
    assert "is not stated in this bundle" in (bundle / "README.md").read_text()


def test_what_is_given_for_it_is_used_and_what_is_assumed_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"batch_sizes": [], "onnx": False, "output": tmp_path / "export"}
    okdc.export(Tiny(), mean=[0.5], std=[0.25], **options)
    assert "Input 3x224x224, as the network states none" in capsys.readouterr().err
    told = json.loads((tmp_path / "export" / "preprocess.json").read_text())
    assert (told["mean"], told["std"], told["input_size"]) == ([0.5] * 3, [0.25] * 3, [3, 224, 224])
    assert "- interpolation: bilinear (assumed" in (tmp_path / "export" / "README.md").read_text()
    with pytest.raises(DataError, match="std not given beside mean"):
        okdc.export(Tiny(), mean=[0.5], **options)
    with pytest.raises(ExportError, match="digits cannot be prepared for this student: its preprocessing is unknown"):
        okdc.export(Tiny(), data="digits", **options)


def test_an_address_is_no_network() -> None:
    with pytest.raises(OkdcError, match=r"the network https://example\.org/x is an address"):
        okdc.export("https://example.org/x")


def test_what_a_network_of_timms_states_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    okdc.export(network, output=tmp_path / "export", batch_sizes=[], onnx=False)
    said = capsys.readouterr().err
    assert "Input 3x160x160, mean (0.5, 0.5, 0.5), " in said and "If it was trained on others: mean=, std=" in said
    assert json.loads((tmp_path / "export" / "preprocess.json").read_text())["mean"] == [0.5] * 3
