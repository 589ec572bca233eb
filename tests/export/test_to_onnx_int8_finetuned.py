"""int8 finetuned by its own float32 self: rounded in training where the file rounds, better after it, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from okdc.deploy import targets
from okdc.system import shipped

to_onnx, to_int8 = targets.find("onnx").module, targets.find("onnx_int8").module
to_finetuned = targets.find("onnx_int8_finetuned").module
finetune_int8 = shipped.load(shipped.folder("export") / "finetune_int8.py")
in_torch = shipped.load(shipped.folder("export") / "onnx_in_torch.py")


def images(count: int, seed: int = 0) -> np.ndarray:
    """Patterns of ten kinds with much noise, (count, 3, 16, 16), in turn."""
    shapes = np.random.default_rng(5).standard_normal((10, 3, 16, 16))
    noise = np.random.default_rng(seed).standard_normal((count, 3, 16, 16))
    return (shapes[np.arange(count) % 10] + 1.5 * noise).astype(np.float32)


class Small(torch.nn.Module):
    """A depthwise network with a gate, as mobile ones have, one of whose channels is far larger than the others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 12, 3, 2, 1)
        self.depthwise = torch.nn.Conv2d(12, 12, 3, 1, 1, groups=12)
        self.gate = torch.nn.Conv2d(12, 12, 1)
        self.act = torch.nn.Hardswish()
        self.head = torch.nn.Linear(12 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.act(self.depthwise(torch.relu(self.stem(images))))
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(torch.nn.functional.avg_pool2d(x, 2).flatten(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network as ONNX, float32; its function is the same with one channel 60 times as large for a while."""
    torch.manual_seed(0)
    network = Small()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(60):
        loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(images(80, step))), torch.arange(80) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        network.stem.weight[0] *= 60
        network.stem.bias[0] *= 60
        network.depthwise.weight[0] /= 60
    path = tmp_path_factory.mktemp("onnx") / to_onnx.FILE
    to_onnx.write(network.eval(), torch.zeros(2, 3, 16, 16), path)
    return path


@pytest.fixture(scope="module")
def quantized(plain: Path) -> Path:
    path = plain.with_name(to_int8.FILE)
    to_int8.write(None, None, path, onnx=plain, calibration=images(64), enough=0.0)
    return path


def in_onnxruntime(model: Path, batch: np.ndarray) -> np.ndarray:
    return to_int8.runner(model, threads=1)(batch)


def last_step(model: Path) -> float:
    """The step in which the file's logits are rounded."""
    graph = onnx.load(model).graph
    scale = next(node.input[1] for node in graph.node if graph.output[0].name in node.output)
    return float(numpy_helper.to_array(next(entry for entry in graph.initializer if entry.name == scale)))


def noise(*logits: np.ndarray) -> float:
    return float(finetune_int8.noise(*map(torch.from_numpy, logits)))


def test_torch_rounds_where_the_file_does(plain: Path, quantized: Path) -> None:
    batch = images(1000, seed=3)
    expected = in_onnxruntime(quantized, batch)
    student = finetune_int8.Student(onnx.load(quantized), onnx.load(plain))
    for network in (in_torch.Network(onnx.load(quantized)), student):
        with torch.no_grad():
            found = network(torch.from_numpy(batch)).numpy()
        assert (np.abs(found - expected) <= 1.01 * last_step(quantized)).mean() >= 0.999
        assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.999
        assert noise(found, expected) < 0.2 * noise(expected, in_onnxruntime(plain, batch))
    again = plain.with_name("again.onnx")
    onnx.save(student.model(), again)
    assert np.abs(in_onnxruntime(again, batch) - expected).max() <= 1.01 * last_step(quantized)


X, Y = (np.random.default_rng(i).standard_normal((2, 4, 7, 6)).astype(np.float32) for i in range(2))
W = np.random.default_rng(2).standard_normal((6, 2, 3, 3)).astype(np.float32)
VECTOR = np.array([0.5, 1.5, -1.0, 2.0], np.float32)
POSITIVE = np.array([0.5, 1.5, 1.0, 2.0], np.float32)
OPERATORS = [  # inputs, attributes
    ("Conv", (X, W, W[:, 0, 0, 0].copy()), {"pads": [1, 0, 2, 1], "strides": [2, 1], "group": 2, "dilations": [1, 2]}),
    ("Gemm", (X[0, 0], Y[0, 0], VECTOR[:1]), {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", (X[0, 0], Y[0, 0]), {"transB": 1}),
    ("MaxPool", (X,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("AveragePool", (X,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("AveragePool", (X,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("AveragePool", (X,), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("GlobalAveragePool", (X,), {}),
    ("ReduceMean", (X, np.array([-1, 1])), {"keepdims": 0}),
    ("ReduceL2", (X, np.array([1])), {}),
    ("LayerNormalization", (X, VECTOR[:1], VECTOR[1:2]), {"axis": -2, "epsilon": 1e-3}),
    ("BatchNormalization", (X, VECTOR, VECTOR + 1, VECTOR - 1, POSITIVE), {"epsilon": 1e-2}),
    ("Softmax", (X,), {"axis": 1}),
    ("HardSigmoid", (X,), {"alpha": 0.3}),
    ("HardSwish", (X * 4,), {}),
    ("Gelu", (X,), {"approximate": "tanh"}),
    ("Clip", (X, np.float32(-0.5)), {}),
    ("Max", (X, VECTOR[:, None, None]), {}),
    ("Div", (np.array([-7, 7]), np.array([2, 2])), {}),
    ("Cast", (X,), {"to": onnx.TensorProto.INT64}),
    ("Shape", (X,), {"start": 1, "end": -1}),
    ("Expand", (VECTOR, np.array([3, 1])), {}),
    ("Reshape", (X, np.array([0, -1, 3])), {}),
    ("Flatten", (X,), {"axis": 2}),
    ("Transpose", (X,), {}),
    ("Squeeze", (X[:1, :, :1], np.array([0, -2])), {}),
    ("Unsqueeze", (X, np.array([-1, 0])), {}),
    ("Slice", (X, np.array([-3, 0]), np.array([2**62, -1]), np.array([2, -1]), np.array([1, 2])), {}),
    ("Gather", (X, np.array([[0, -1], [2, 2]])), {"axis": 2}),
    ("Pad", (X, np.array([1, 0, 2, 3]), np.float32(0.5), np.array([3, 1])), {}),
    ("QuantizeLinear", (X, np.float32(0.02), np.uint8(99)), {}),
    ("QuantizeLinear", (X, POSITIVE / 90, np.zeros(4, np.int8)), {"axis": 1}),
    ("DequantizeLinear", (W.astype(np.int8), POSITIVE[:3], np.arange(3, dtype=np.int8)), {"axis": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "inputs", "attributes"), OPERATORS, ids=[name for name, *_ in OPERATORS])
def test_operators_are_those_of_onnx(operator: str, inputs: tuple[np.ndarray, ...], attributes: dict[str, Any]) -> None:
    names = [f"i{index}" for index in range(len(inputs))]
    first = onnx.helper.make_tensor_value_info("i0", onnx.helper.np_dtype_to_tensor_dtype(inputs[0].dtype), None)
    node = onnx.helper.make_node(operator, names, ["out"], **attributes)
    stored = [numpy_helper.from_array(np.asarray(array), name) for array, name in zip(inputs, names, strict=True)][1:]
    last = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.UNDEFINED, None)
    graph = onnx.helper.make_graph([node], "one", [first], [last], stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    expected = ReferenceEvaluator(model).run(None, {"i0": inputs[0]})[0]
    found = in_torch.Network(model)(torch.from_numpy(inputs[0]))
    assert found.shape == expected.shape and torch.equal(found.isnan(), torch.from_numpy(np.isnan(expected)))
    np.testing.assert_allclose(found.double(), expected.astype(np.float64), rtol=1e-5, atol=1e-5)


def test_what_torch_cannot_compute_is_named(plain: Path) -> None:
    model = onnx.load(plain)
    model.graph.node[1].op_type = "Shrink"
    with pytest.raises(RuntimeError, match="okdc knows no Shrink of ONNX"):
        in_torch.Network(model)


def test_better_on_other_images_and_int8_throughout(
    plain: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(to_finetuned, "_STEPS", 100)
    path = tmp_path / to_finetuned.FILE
    further = images(256, seed=4)
    facts = to_finetuned.write(
        None, None, path, onnx=plain, onnx_int8=quantized, calibration=images(128), finetuning=further
    )
    batch = images(1000, seed=9)
    exact = in_onnxruntime(plain, batch)
    assert noise(in_onnxruntime(path, batch), exact) < 0.75 * noise(in_onnxruntime(quantized, batch), exact)
    assert to_finetuned.runner(path).precisions == {"int8": 4}
    assert facts["images"] == 64 + 256 and facts["trial_images"] == 64  # which are not trained on
    assert facts["after"]["noise"] < facts["before"]["noise"] and facts["onnx_int8"]["agreement"] >= 90
    assert "int8-finetune step 100/100" in capsys.readouterr().err
    names = [{entry.name for entry in onnx.load(file).graph.initializer} for file in (quantized, path)]
    assert names[0] == names[1]  # the same graph, with other numbers in it


def test_the_same_twice(plain: Path, quantized: Path) -> None:
    given = onnx.load(quantized), onnx.load(plain), images(64), in_onnxruntime(plain, images(64))
    first, second = (finetune_int8.finetune(*given, steps=3).SerializeToString() for _ in range(2))
    assert first == second != given[0].SerializeToString()


def test_what_is_no_better_is_not_written(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_finetuned, "_STEPS", 0)
    with pytest.raises(RuntimeError, match=r"did not help, so .* 32 training images .* before"):
        to_finetuned.write(None, None, tmp_path / "m.onnx", onnx=plain, calibration=images(64))
    with pytest.raises(RuntimeError, match="training images"):
        to_finetuned.write(None, None, tmp_path / "m.onnx", onnx=plain)
    assert list(tmp_path.iterdir()) == []
