"""model.onnx gives torch's numbers at every batch size, holds no trace of this machine, and leaves the student be."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from timm.models.byobnet import MobileOneBlock
from torch import nn

from okdc.deploy import targets
from tests.helpers.exported import EXAMPLE, assert_same, tiny

pytest.importorskip("onnxruntime", reason="ONNX is compared with torch by onnxruntime")

to_onnx = targets.find("onnx").module
writing = to_onnx._beside("onnx_writing")


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


def test_no_window_is_larger_than_its_map(tmp_path):
    pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
    network = nn.Sequential(nn.Conv2d(3, 4, 2), pool, nn.Conv2d(4, 4, 3), pool, nn.Flatten(), nn.LazyLinear(5))
    images = torch.randn(2, 3, 7, 7)  # maps of 6 pixels, and of 1
    expected = network.eval()(images).detach().numpy()
    to_onnx.write(network, images, tmp_path / "m.onnx")
    assert np.abs(to_onnx.runner(tmp_path / "m.onnx")(images.numpy()) - expected).max() < 1e-5
    cv2 = pytest.importorskip("cv2", reason="OpenCV is one of the runtimes that compute such a window wrongly")
    net = cv2.dnn.readNetFromONNX(str(tmp_path / "m.onnx"))
    net.setInput(images[:1].numpy())
    assert np.abs(net.forward() - expected[:1]).max() < 1e-5


def test_file_is_clean_and_stamped(exported):
    _, path, _ = exported
    model = onnx.load(path)
    assert {entry.key: entry.value for entry in model.metadata_props} == {"okdc.labels": '["a", "ü"]'}
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20}
    assert not any(part.metadata_props for part in [*model.graph.node, *model.graph.value_info, *model.graph.input])
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


# What each opset needs by onnx's docs/Versioning.md; Small's relu was written anew in 14, and ReduceMean in 18.
@pytest.mark.parametrize(("opset", "format", "way"), [(13, 7, "torchscript"), (17, 8, "dynamo"), (22, 10, "dynamo")])
def test_opset_is_the_one_asked_for_in_the_oldest_format_that_holds_it(tmp_path, opset, format, way):
    network = Small().eval()
    facts = to_onnx.write(network, EXAMPLE, tmp_path / "m.onnx", opset=opset, metadata={"okdc.labels": "[]"})
    model = onnx.load(tmp_path / "m.onnx")
    assert [entry.version for entry in model.opset_import] == [opset] == [facts["opset"]]
    assert model.ir_version == facts["ir_version"] == format and facts["path"] == way
    assert {entry.key: entry.value for entry in model.metadata_props} == {"okdc.labels": "[]"}
    assert "Identity" not in {node.op_type for node in model.graph.node}
    assert_same(to_onnx.runner(tmp_path / "m.onnx"), network)


@pytest.mark.parametrize("opset", [12, 23])
def test_opset_out_of_range(tmp_path, opset):
    with pytest.raises(RuntimeError, match="13 to 22"):
        to_onnx.write(Small(), EXAMPLE, tmp_path / "m.onnx", opset=opset)


def test_what_an_older_opset_cannot_say_is_refused_by_name():
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in "xsy"]
    node = onnx.helper.make_node("LayerNormalization", ["x", "s"], ["y"])
    graph = onnx.helper.make_graph([node], "g", ends[:2], ends[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    assert to_onnx._clean(onnx_ir.from_proto(model), 17).opset_import[0].version == 17
    with pytest.raises(RuntimeError, match="LayerNormalization cannot be put into opset 16"):
        to_onnx._clean(onnx_ir.from_proto(model), 16)


def test_functions_need_a_newer_format():
    pair = [onnx.helper.make_opsetid("", 13), onnx.helper.make_opsetid("own", 1)]
    double = onnx.helper.make_function(
        "own", "Double", ["x"], ["y"], [onnx.helper.make_node("Add", ["x", "x"], ["y"])], pair[:1]
    )
    ends = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "ab"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Double", ["a"], ["b"], domain="own")], "g", ends[:1], ends[1:]
    )
    assert writing.plain(onnx.helper.make_model(graph, opset_imports=pair, functions=[double])).ir_version == 8
    double.overload = "other"
    assert writing.plain(onnx.helper.make_model(graph, opset_imports=pair, functions=[double])).ir_version == 10
    assert writing.plain(onnx.helper.make_model(graph, opset_imports=pair)).ir_version == 7


def test_attributes_that_say_what_is_so_without_them_are_left_out():
    make = onnx.helper.make_node
    nodes = [
        make("HardSigmoid", ["x"], ["a"], alpha=1 / 6, beta=0.5),  # 0.5 is what it has anyway, 1/6 is not
        make("Softmax", ["a"], ["b"], axis=-1),
        make("Flatten", ["b"], ["c"], axis=0),
        make("Concat", ["c"], ["y"], axis=1),  # must be told: it has no value of its own
    ]
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in "xy"]
    inner = onnx.helper.make_graph(nodes, "then", [], ends[1:])
    choice = make("If", ["on"], ["z"], then_branch=inner, else_branch=inner)
    on = onnx.helper.make_tensor_value_info("on", onnx.TensorProto.BOOL, [])
    other = make("HardSigmoid", ["x"], ["w"], domain="own", beta=0.5)  # nobody knows what that has without
    graph = onnx.helper.make_graph([*nodes, choice, other], "g", [ends[0], on], ends[1:])
    versions = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("own", 1)]
    model = writing.plain(onnx.helper.make_model(graph, opset_imports=versions))
    told = [[attribute.name for attribute in node.attribute] for node in model.graph.node]
    assert told[:4] == [["alpha"], [], ["axis"], ["axis"]] and told[5] == ["beta"]
    within = model.graph.node[4].attribute[0].g.node
    assert [[attribute.name for attribute in node.attribute] for node in within] == told[:4]
    older = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 12), versions[1]])
    assert [attribute.name for attribute in writing.plain(older).graph.node[1].attribute] == ["axis"]  # it was 1 then


def test_opencv_gives_the_same_of_a_gate_with_hard_sigmoid(tmp_path):
    """A hard sigmoid that states its usual `beta` is to OpenCV a hard swish, silently."""
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    network = Gated().eval()
    to_onnx.write(network, EXAMPLE, tmp_path / "m.onnx")
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    net = cv2.dnn.readNetFromONNX(str(tmp_path / "m.onnx"))
    net.setInput(image.numpy())
    with torch.no_grad():
        assert np.allclose(net.forward(), network(image).numpy(), atol=1e-5)


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


class Gated(Small):
    """Weighs its channels as MobileNetV3's blocks do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gate = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1)

    def forward(self, images):
        maps = self.conv(images)
        return super().forward(maps * nn.functional.hardsigmoid(self.gate(maps.mean((2, 3), keepdim=True))))


class Branching(Small):
    """Looks at a value, so that torch.export cannot capture it; on images it always takes the same way."""

    def forward(self, images):
        return super().forward(images) if images.abs().sum().item() >= 0 else images


class Loud(Branching):
    """Writes past Python, as torch's own code does about a graph that it cannot export."""

    def forward(self, images):
        for stream in (1, 2):
            os.write(stream, b"graph(%images : Float(*, 3, 16, 16))")
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


class Leaving(Small):
    """Leaves torch on the way, so that what it computes there of the images that are traced becomes a constant."""

    def forward(self, images):
        seen = torch.from_numpy(images.detach().numpy() < np.inf).float()
        return super().forward(images * seen)


@pytest.mark.parametrize(("network", "way"), [(Branching(), "torchscript"), (MathOnly(), "math_sdpa")])
def test_fallbacks(tmp_path, network, way):
    assert to_onnx.write(network, EXAMPLE, tmp_path / "m.onnx")["path"] == way
    assert_same(to_onnx.runner(tmp_path / "m.onnx"), network)
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Small(2), "returned tuple"),
        (Frozen(), "torchscript: .*Reshape"),
        (Leaving(), "torchscript: .*3 answers for 1 image"),
    ],
)
def test_failure_keeps_the_good_file(tmp_path, network, reason):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"good")
    with pytest.raises(RuntimeError, match=reason) as caught:
        to_onnx.write(network, EXAMPLE, path)
    assert re.search(reason, str(caught.value).splitlines()[0])  # the line that is shown
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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_student_on_cuda(tmp_path):
    network = Small().cuda()
    to_onnx.write(network, EXAMPLE.cuda(), tmp_path / "m.onnx")
    assert network.head.weight.is_cuda
    assert_same(to_onnx.runner(tmp_path / "m.onnx"), network.cpu())


@pytest.mark.cuda
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
    assert to_onnx._beside("onnx_session").shapes(session) == {
        "trt_profile_min_shapes": "input:1x3x32x32",
        "trt_profile_opt_shapes": "input:8x3x32x32",
        "trt_profile_max_shapes": "input:32x3x32x32",
    }
