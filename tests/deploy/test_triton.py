"""The Triton repository says of a model what its graph says of itself; read with Triton's own field names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from okdc import deploy
from okdc.deploy import targets, triton
from okdc.recipe import ExportSettings

CLASSES = ("red", "green", "blue", "grey")
# Of ModelConfig in Triton's model_config.proto: the fields that okdc writes, with their types and numbers.
SCHEMA = {
    "Input": [("name", "string", 1), ("data_type", "enum", 2), ("dims", "int64s", 4)],
    "Output": [("name", "string", 1), ("data_type", "enum", 2), ("dims", "int64s", 3), ("label_filename", "string", 4)],
    "Batching": [("preferred_batch_size", "int32s", 1), ("max_queue_delay_microseconds", "uint64", 2)],
    "ModelConfig": [
        ("name", "string", 1), ("platform", "string", 2), ("max_batch_size", "int32", 4), ("input", "Inputs", 5),
        ("output", "Outputs", 6), ("dynamic_batching", "Batching", 11),
    ],
}  # fmt: skip
UINT8, FLOAT32 = 2, 11  # of Triton's DataType, which has other numbers than ONNX


def config_class() -> type[Any]:
    """ModelConfig as protobuf's class, from SCHEMA."""
    Field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="triton", syntax="proto3")
    enum = file.enum_type.add(name="DataType")
    enum.value.add(name="TYPE_INVALID", number=0)
    enum.value.add(name="TYPE_UINT8", number=UINT8)
    enum.value.add(name="TYPE_FP32", number=FLOAT32)
    for message, fields in SCHEMA.items():
        entry = file.message_type.add(name=message)
        for name, kind, number in fields:
            field = entry.field.add(name=name, number=number)
            field.label = Field.LABEL_REPEATED if kind.endswith("s") else Field.LABEL_OPTIONAL
            kind = kind.removesuffix("s")
            if kind in SCHEMA or kind == "enum":
                field.type_name = ".triton.DataType" if kind == "enum" else f".triton.{kind}"
            field.type = getattr(Field, f"TYPE_{'MESSAGE' if kind in SCHEMA else kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("triton.ModelConfig"))


def config(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(), config_class()())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "export"
    settings = ExportSettings(onnx=False, triton=True, batch_sizes=[])
    preprocess = timm.data.resolve_data_config({"input_size": (3, 32, 32)})
    network = timm.create_model("test_resnet", num_classes=4)
    arch = "my_package.networks:build"
    deploy.export_bundle(network, None, settings, folder, arch=arch, preprocess=preprocess, classes=CLASSES)
    return folder


def test_the_configuration_is_that_of_the_graph(bundle: Path) -> None:
    (folder,) = (bundle / "triton").iterdir()
    read = config(folder)
    assert read.name == folder.name == "my_package_networks_build" and read.platform == "onnxruntime_onnx"
    graph = onnx.load(folder / "1" / "model.onnx").graph
    for written, value in ((read.input, graph.input), (read.output, graph.output)):
        (tensor,), (named,) = written, value
        batch, *rest = named.type.tensor_type.shape.dim
        assert tensor.name == named.name and tensor.data_type == FLOAT32
        assert named.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert list(tensor.dims) == [side.dim_value for side in rest]
        assert batch.dim_param, "dynamic batching needs a graph whose batch is free"
    assert read.HasField("dynamic_batching") and read.dynamic_batching.max_queue_delay_microseconds > 0
    images = np.zeros((read.max_batch_size, *read.input[0].dims), dtype=np.float32)
    run = targets.find("onnx").module.runner(folder / "1" / "model.onnx")
    assert run(images).shape == (read.max_batch_size, 4)
    labels = (folder / read.output[0].label_filename).read_text().splitlines()
    assert tuple(labels) == CLASSES
    assert deploy.check_sums(bundle) == []
    assert (folder / "1" / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    assert "tritonserver --model-repository" in (bundle / "README.md").read_text()


def test_an_engine_is_a_model_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"plan")
    triton.write(tmp_path, "resnet18", (3, 224, 224), CLASSES, 64)
    folder = tmp_path / "triton" / "resnet18_tensorrt"
    read = config(folder)
    assert (read.name, read.platform, read.max_batch_size) == ("resnet18_tensorrt", "tensorrt_plan", 64)
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"


def test_one_with_its_preprocessing_inside_takes_decoded_images(bundle: Path, tmp_path: Path) -> None:
    preprocess = timm.data.resolve_data_config({"input_size": (3, 32, 32)})
    full = targets.find("onnx_full").module
    full.write(None, None, tmp_path / full.FILE, onnx=bundle / "model.onnx", preprocess=preprocess)
    triton.write(tmp_path, "test_resnet", (3, 32, 32), CLASSES, 64)
    folder = tmp_path / "triton" / "test_resnet_full"
    read, graph = config(folder), onnx.load(folder / "1" / "model.onnx").graph
    assert (read.name, read.platform, read.max_batch_size) == (folder.name, "onnxruntime_onnx", 64)
    kinds = {UINT8: onnx.TensorProto.UINT8, FLOAT32: onnx.TensorProto.FLOAT}
    for written, values in ((read.input, graph.input), (read.output, graph.output)):
        assert [tensor.name for tensor in written] == [value.name for value in values]
        for tensor, value in zip(written, values, strict=True):
            assert kinds[tensor.data_type] == value.type.tensor_type.elem_type
            assert list(tensor.dims) == [side.dim_value or -1 for side in value.type.tensor_type.shape.dim[1:]]
    assert all((folder / tensor.label_filename).is_file() for tensor in read.output)
