"""The int8 and fp16 files: the right numbers in the right types, and layers left in float where measurement says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper

from okdc.deploy import targets

to_onnx, to_fp16 = targets.find("onnx").module, targets.find("onnx_fp16").module
to_int8, to_trt = targets.find("onnx_int8").module, targets.find("onnx_int8_trt").module
METADATA = {"okdc.labels": '["a"]'}


def images(count: int, seed: int = 0) -> np.ndarray:
    """Patterns of ten kinds with noise, (count, 3, 32, 32), in turn."""
    shapes = np.random.default_rng(5).standard_normal((10, 3, 32, 32))
    noise = np.random.default_rng(seed).standard_normal((count, 3, 32, 32))
    return (shapes[np.arange(count) % 10] + 0.5 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """A small network that tells the patterns apart."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=10)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(12):
        loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(images(40, step))), torch.arange(40) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def plain(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / to_onnx.FILE
    to_onnx.write(network, torch.zeros(2, 3, 32, 32), path, metadata=METADATA)
    return path


def logits(network: torch.nn.Module, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(batch)).numpy()


def assert_plain(model: onnx.ModelProto) -> None:
    """What to_onnx.py leaves out of a file is in none that is made of it: onnxruntime spells out what is usual."""
    before = model.SerializeToString()
    assert to_onnx._beside("onnx_writing").plain(model).SerializeToString() == before and model.ir_version == 9


def spoil(path: Path, to: Path) -> Path:
    """The same function with one channel of the first convolution 3,000 times as large, and small again after it."""
    model = onnx.load(path)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    first, second = convolutions[0].input, convolutions[1].input
    for name, axis, factor in [(first[1], 0, 3000), (first[2], 0, 3000), (second[1], 1, 1 / 3000)]:
        values = numpy_helper.to_array(tensors[name]).copy()
        np.moveaxis(values, axis, 0)[0] *= np.float32(factor)
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, to)
    return to


def test_fp16_is_half_the_size_with_float32_around_it(network: torch.nn.Module, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / to_fp16.FILE
    facts = to_fp16.write(None, None, path, onnx=plain)
    run = to_fp16.runner(path, threads=1)
    assert_plain(onnx.load(path))
    assert run.precisions.keys() == {"fp16"} and to_onnx.runner(plain).precisions.keys() == {"fp32"}
    assert facts["bytes"] == path.stat().st_size < 0.6 * plain.stat().st_size and facts["kept_in_float"] == []
    model = onnx.load(path)
    assert {entry.key: entry.value for entry in model.metadata_props} == METADATA
    assert {value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]} == {1}
    for count in (1, 3, 8):
        given, expected = run(images(count)), logits(network, images(count))
        assert given.dtype == np.float32 and np.abs(given - expected).max() <= 1e-2 * np.abs(expected).max()


class Large(torch.nn.Module):
    """Sums squares beyond what float16 holds (65,504), then takes the root."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((images * 30).pow(2).sum((2, 3)).sqrt() / 100)


def test_fp16_keeps_what_would_overflow_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    facts = to_fp16.write(Large(), torch.zeros(2, 3, 32, 32), tmp_path / "m.onnx", calibration=images(8))
    nodes = {node.name: node for node in onnx.load(tmp_path / "m.onnx").graph.node}
    summing, root = (nodes[kept["layer"]] for kept in facts["kept_in_float"])
    assert (summing.op_type, root.op_type) == ("ReduceSum", "Sqrt")
    assert all(kept["largest"] > 65504 for kept in facts["kept_in_float"])
    assert root.input[0] == summing.output[0]  # straight: in float16 on the way it would be infinite
    made = {
        node.attribute[0].i for node in nodes.values() if node.op_type == "Cast" and node.input[0] == root.output[0]
    }
    assert made == {onnx.TensorProto.FLOAT16}  # small enough again
    assert to_fp16.runner(tmp_path / "m.onnx").precisions == {"fp16": 1}


@pytest.mark.parametrize(("target", "signed"), [(to_int8, False), (to_trt, True)], ids=["cpu", "tensorrt"])
def test_int8_as_its_runtime_wants_it(network: torch.nn.Module, plain: Path, tmp_path: Path, target, signed) -> None:
    path = tmp_path / target.FILE
    facts = target.write(None, None, path, onnx=plain, calibration=images(64))
    run, model = target.runner(path, threads=1), onnx.load(path)
    assert run.precisions.keys() == {"int8"} and path.stat().st_size < 0.5 * plain.stat().st_size
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    zeros = [numpy_helper.to_array(tensors[node.input[2]]) for node in quantizers]
    assert {zero.dtype for zero in zeros} == {np.dtype(np.int8 if signed else np.uint8)}
    assert any(zero.any() for zero in zeros) is not signed  # TensorRT takes no zero point but 0
    dequantized = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    biases = [name for name in dequantized if name in tensors and tensors[name].data_type == onnx.TensorProto.INT32]
    assert bool(biases) is not signed  # nor biases in 32 bits
    assert {entry.domain for entry in model.opset_import} == {""}
    assert_plain(model)
    assert {entry.key: entry.value for entry in model.metadata_props} == METADATA
    batch = images(50, seed=9)
    assert (run(batch).argmax(1) == logits(network, batch).argmax(1)).mean() >= 0.97
    assert facts["agreement"] >= 99 and facts["kept_in_float"] == [] and facts["calibration_images"] == 32
    assert [run(images(count)).shape for count in (1, 3)] == [(1, 10), (3, 10)]


def test_the_layer_that_does_the_damage_is_found_and_kept_in_float(
    network: torch.nn.Module, plain: Path, tmp_path: Path
) -> None:
    source = spoil(plain, tmp_path / "spoiled.onnx")
    batch = images(50, seed=9)
    assert np.abs(to_onnx.runner(source)(batch) - logits(network, batch)).max() < 1e-2
    facts = to_int8.write(None, None, tmp_path / "m.onnx", onnx=source, calibration=images(64))
    first, second = [node.name for node in onnx.load(source).graph.node if node.op_type == "Conv"][:2]
    assert facts["steps"][0]["agreement"] < 97  # quantised whole it is broken
    assert {each["layer"] for each in facts["kept_in_float"]} & {first, second}
    assert len(facts["kept_in_float"]) <= facts["layers"] // 2
    run = to_int8.runner(tmp_path / "m.onnx")
    assert run.precisions["fp32"] >= 1 and run.precisions["int8"] >= 1
    assert (run(batch).argmax(1) == logits(network, batch).argmax(1)).mean() >= 0.97
    loose = to_int8.write(None, None, tmp_path / "m.onnx", onnx=source, calibration=images(64), enough=0.0)
    assert len(loose["steps"]) == 1 and loose["kept_in_float"] == []  # whoever asks for less is not made to search


class OneToken(torch.nn.Module):
    """Attends to a single token, so that each softmax is over one score: windows of a Swin on small images."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Conv2d(3, 8, 32, bias=False), torch.nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).mT
        scores = (tokens @ tokens.mT).softmax(-1)
        return self.head((scores @ tokens)[:, 0])


def test_a_softmax_is_not_in_8_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = OneToken().eval()
    facts = to_int8.write(network, torch.zeros(2, 3, 32, 32), tmp_path / "m.onnx", calibration=images(64))
    batch = images(20, seed=9)
    off = np.abs(to_int8.runner(tmp_path / "m.onnx")(batch) - logits(network, batch)).max()
    assert facts["kept_in_float"] == [] and off < 0.05 * np.abs(logits(network, batch)).max()
    model = onnx.load(tmp_path / "m.onnx")
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    assert [made[node.input[0]] for node in model.graph.node if node.op_type == "Softmax"] == ["MatMul"]
    assert {name for node in model.graph.node for name in node.input} >= {each.name for each in model.graph.initializer}


class Stream(torch.nn.Module):
    """Blocks that each add a little to tokens, which a norm reads: a transformer without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Conv2d(3, 16, 8, 8), torch.nn.Linear(16, 10)
        block = (
            torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 16), torch.nn.GELU()) for _ in range(3)
        )
        self.blocks = torch.nn.ModuleList(block)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).mT
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.head(tokens.mean(1))


def test_sums_that_a_norm_reads_are_not_in_8_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    facts = to_int8.write(Stream().eval(), torch.zeros(2, 3, 32, 32), tmp_path / "m.onnx", calibration=images(64))
    model = onnx.load(tmp_path / "m.onnx")
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    norms = [made[node.input[0]] for node in model.graph.node if node.op_type == "LayerNormalization"]
    assert norms[1:] == ["Add", "Add"] and facts["kept_in_float"] == []
    assert to_int8.runner(tmp_path / "m.onnx").precisions == {"int8": facts["layers"]}


def test_without_images_nothing_is_written(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="training images"):
        to_int8.write(None, None, tmp_path / "m.onnx", onnx=plain)
    assert list(tmp_path.iterdir()) == []


def test_made_from_the_network_where_there_is_no_onnx(network: torch.nn.Module, tmp_path: Path) -> None:
    facts = to_int8.write(network, torch.zeros(2, 3, 32, 32), tmp_path / "m.onnx", calibration=images(64))
    assert facts["agreement"] >= 99 and [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
