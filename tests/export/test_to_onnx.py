"""model.onnx gives torch's numbers at every batch size, holds no trace of this machine, and leaves the student be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from timm.models.byobnet import MobileOneBlock
from torch import nn

from okdc.deploy import targets
from tests.helpers.exported import EXAMPLE, assert_same, tiny

to_onnx = targets.find("onnx").module


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network, the file it was written to, and the facts."""
    network, path = tiny(), tmp_path_factory.mktemp("onnx") / to_onnx.FILE
    return network, path, to_onnx.write(network, EXAMPLE, path, metadata={"okdc.labels": '["a", "ü"]'})


def test_available_and_instant():
    assert to_onnx.available() is None
    code = f"import sys, runpy; runpy.run_path({to_onnx.__file__!r}); assert not {{'torch', 'onnx'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_equals_torch_at_every_batch(exported):
    network, path, facts = exported
    run = to_onnx.runner(path, threads=1)
    assert run.provider == "CPUExecutionProvider"
    assert_same(run, network)
    assert facts["path"] == "dynamo" and facts["opset"] == 20 and facts["rel_error"] <= 1e-5
    assert facts["bytes"] == path.stat().st_size and facts["nodes"] > 10 and facts["dynamic_batch"]


def test_file_is_clean_and_stamped(exported):
    _, path, _ = exported
    model = onnx.load(path)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"okdc.labels": '["a", "ü"]'}
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
    content = path.read_bytes()
    here = [Path.cwd(), Path.home(), Path(torch.__file__).parents[1], "site-packages", ".py"]
    assert not [place for place in here if str(place).encode() in content]
    assert sorted(path.parent.iterdir()) == [path]  # one file, nothing temporary left


def test_attention_network(tmp_path):
    network = tiny("test_vit", img_size=32)
    to_onnx.write(network, EXAMPLE, tmp_path / "vit.onnx")
    assert_same(to_onnx.runner(tmp_path / "vit.onnx", threads=1), network)


def test_parallel_branches_are_fused(tmp_path):
    network = nn.Sequential(MobileOneBlock(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    network(torch.randn(4, 3, 32, 32))  # moves the batch statistics
    to_onnx.write(network, EXAMPLE, tmp_path / "fused.onnx")
    operators = {node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node}
    assert "BatchNormalization" not in operators
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())  # the student keeps its own
    assert_same(to_onnx.runner(tmp_path / "fused.onnx", threads=1), network)


@pytest.mark.parametrize("opset", [18, 22])
def test_opset_is_the_one_asked_for(tmp_path, opset):
    assert to_onnx.write(Small(), EXAMPLE, tmp_path / "m.onnx", opset=opset)["opset"] == opset
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset


@pytest.mark.parametrize("opset", [17, 23])
def test_opset_out_of_range(tmp_path, opset):
    with pytest.raises(RuntimeError, match="18 to 22"):
        to_onnx.write(Small(), EXAMPLE, tmp_path / "m.onnx", opset=opset)


def test_student_is_left_as_it_was(tmp_path):
    network = Small().to(torch.float64).train()
    network.norm.eval()  # a frozen part
    before = {key: value.clone() for key, value in network.state_dict().items()}
    to_onnx.write(network, EXAMPLE, tmp_path / "m.onnx")
    assert network.training and network.head.training and not network.norm.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.head.weight.dtype == torch.float64


def test_exporters_are_quiet(tmp_path, capfd):
    to_onnx.write(Loud(), EXAMPLE, tmp_path / "m.onnx")
    to_onnx.runner(tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")


class Small(nn.Module):
    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.norm, self.head, self.outputs = nn.BatchNorm2d(3), nn.Linear(3, 5), outputs

    def forward(self, images):
        logits = self.head(self.norm(images).relu().mean((2, 3)))
        return logits if self.outputs == 1 else (logits,) * self.outputs


class Branching(Small):
    """Looks at a value, so that torch.export cannot capture it; on images it always takes the same way."""

    def forward(self, images):
        return super().forward(images) if images.abs().sum().item() >= 0 else images


class Loud(Branching):
    """Writes past Python, as torch's own code does about a graph that it cannot export."""

    def forward(self, images):
        os.write(2, b"graph(%images : Float(*, 3, 16, 16))")
        return super().forward(images)


class MathOnly(Small):
    """Cannot be exported while fused attention is on: what happens to windowed attention networks such as maxvit."""

    def forward(self, images):
        if torch.compiler.is_exporting() and torch.backends.cuda.flash_sdp_enabled():
            raise RuntimeError("Cannot view a tensor with these strides")
        return super().forward(images)


class Frozen(Branching):
    """Can only be traced, and the trace is right only for the batch that it was traced with."""

    def forward(self, images):
        return super().forward(images).reshape(int(images.shape[0]), 5)


@pytest.mark.parametrize(("network", "way"), [(Branching(), "torchscript"), (MathOnly(), "math_sdpa")])
def test_fallbacks(tmp_path, network, way):
    assert to_onnx.write(network, EXAMPLE, tmp_path / "m.onnx")["path"] == way
    assert_same(to_onnx.runner(tmp_path / "m.onnx"), network)
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(("network", "reason"), [(Small(2), "returned tuple"), (Frozen(), "torchscript: .*Reshape")])
def test_failure_keeps_the_good_file(tmp_path, network, reason):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"good")
    with pytest.raises(RuntimeError, match=reason):
        to_onnx.write(network, EXAMPLE, path)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_runner_errors(exported, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="cannot run on 'tpu'"):
        to_onnx.runner(exported[1], device="tpu")
    (tmp_path / "broken.onnx").write_bytes(b"not onnx")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(RuntimeError, match=r"cannot load broken\.onnx") as caught:
        to_onnx.runner(f"{tmp_path.name}/broken.onnx")
    assert tmp_path.name not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_silent_fallback_to_the_cpu(exported):
    with pytest.raises(RuntimeError, match="CUDAExecutionProvider"):
        to_onnx.runner(exported[1], device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_student_on_cuda(tmp_path):
    network = Small().cuda()
    to_onnx.write(network, EXAMPLE.cuda(), tmp_path / "m.onnx")
    assert network.head.weight.is_cuda
    assert_same(to_onnx.runner(tmp_path / "m.onnx"), network.cpu())


@pytest.mark.parametrize(("device", "provider"), [("cuda", "CUDA"), ("cuda:0", "CUDA"), ("tensorrt", "Tensorrt")])
def test_a_gpu_provider_is_in_use_or_refused(exported, device, provider):
    """onnxruntime itself would go on on the CPU without a word, and be measured as if it were the GPU."""
    network, path, _ = exported
    try:
        run = to_onnx.runner(path, device)
    except RuntimeError as error:
        required = torch.cuda.is_available() and os.environ.get("OKDC_REQUIRE_TRT") == "1"
        assert not required, f"OKDC_REQUIRE_TRT=1, but: {error}"
        assert not torch.cuda.is_available() or "libraries" in str(error) or "cannot load" in str(error)
        assert re.search("cannot load|fell back", str(error))
    else:
        assert run.provider.startswith(provider)
        assert_same(run, network, limit=5e-3 if provider == "Tensorrt" else 1e-4)


def test_the_tensorrt_provider_gets_its_device_and_no_more_images_than_it_is_prepared_for(exported, monkeypatch):
    import onnxruntime

    asked, sizes = [], []

    class Session(onnxruntime.InferenceSession):
        """onnxruntime on the CPU, which claims to be what was asked for."""

        def __init__(self, model, options, providers, **_):
            asked.append(providers[0])
            super().__init__(model, options, ["CPUExecutionProvider"])

        def get_providers(self):
            return [asked[-1][0]]

        def run(self, names, feeds):
            sizes.append(len(feeds["input"]))
            return super().run(names, feeds)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    run = to_onnx.runner(exported[1], "tensorrt:1")
    provider, settings = asked[-1]
    assert provider == run.provider == "TensorrtExecutionProvider"
    assert settings["device_id"] == "1" and settings["trt_profile_max_shapes"] == "input:32x3x32x32"
    images = np.random.default_rng(0).standard_normal((70, 3, 32, 32), dtype=np.float32)
    assert np.allclose(run(images), to_onnx.runner(exported[1])(images), atol=1e-5) and sizes[:3] == [32, 32, 6]


def test_the_tensorrt_provider_is_told_which_batches_come(exported):
    import onnxruntime

    session = onnxruntime.InferenceSession(exported[1], providers=["CPUExecutionProvider"])
    assert to_onnx._shapes(session) == {
        "trt_profile_min_shapes": "input:1x3x32x32",
        "trt_profile_opt_shapes": "input:8x3x32x32",
        "trt_profile_max_shapes": "input:32x3x32x32",
    }
