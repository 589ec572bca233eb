"""A `tensorrt` with the public names of a real version and nothing else, that behaves as the real one was seen to.

A name that is not in tensorrt_names.json raises AttributeError, also when it is set. A plan is a piece of json that
holds its ONNX, and a context runs that ONNX on the CPU, from and to the addresses that it was given.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from okdc.deploy import targets

onnxruntime = pytest.importorskip("onnxruntime", reason="engines are compared with onnxruntime")
NAMES = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())
_KINDS = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT8: "INT8"}
_FORMATS = {"FLOAT": "Row major linear FP32", "HALF": "Row major linear FP16", "INT8": "Row major Int8 format"}


@dataclass
class Plan:
    """What shall happen, where it is not success, and what did."""

    errors: list[Any] = field(default_factory=list)  # ParserErrors: the parser gives False
    add: int = 0  # what add_optimization_profile gives
    build: str | None = None  # a log line; building gives None
    load: str | None = None  # a log line; loading gives None
    memory: bool = True  # else there is none for a context
    enqueue: bool = True  # what execute_async_v3 gives
    cache_fits: bool = True  # else a cache that is not empty is of another GPU
    built: str | None = None  # the type that all layers are built in, whatever the ONNX asks for
    told: list[tuple[Any, ...]] = field(default_factory=list)  # what was set, and calls worth knowing


class Enum:
    """An enum of the real package: its members by name, and the one number that is used."""

    def __init__(self, version: str, kind: str) -> None:
        self._version, self._kind = version, kind

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES[self._version][self._kind]:
            raise AttributeError(f"tensorrt {self._version}: {self._kind} has no member {name!r}")
        number = 1 if (name, self._version[:2]) == ("STRONGLY_TYPED", "10") else 0
        member = type(self._kind, (), {"name": name, "__int__": lambda _: number})()
        self.__dict__[name] = member
        return member


class Object:
    """An object of the class `kind` of the real package: what its subclass has must be in the list."""

    kind = ""

    def __init__(self, package: Package, *_: Any) -> None:
        self.__dict__["_trt"] = package
        own = {name for name in dir(type(self)) if name[0] != "_" and name != "kind"}
        assert own <= set(self._names), (self.kind, own - set(self._names))

    @property
    def _names(self) -> list[str]:
        return NAMES[self._trt.__version__][self.kind]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"tensorrt {self._trt.__version__}: {self.kind} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name[0] != "_":
            if name not in self._names:
                self.__getattr__(name)
            self._trt.plan.told.append((self.kind, name, getattr(value, "name", value)))
        self.__dict__[name] = value


class Builder(Object):
    kind = "Builder"

    def __init__(self, package: Package, log: Any) -> None:
        super().__init__(package)
        self._log = log

    def create_network(self, flags: int = 0) -> Network:
        self._trt.plan.told.append(("flags", flags))
        return Network(self._trt)

    def create_builder_config(self) -> Config:
        return Config(self._trt)

    def create_optimization_profile(self) -> Profile:
        return Profile(self._trt)

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        reason = self._trt.plan.build
        if reason is None and not config._profiles:
            reason = "Network has dynamic or shape inputs, but no optimization profile has been defined"
        if reason is not None:
            self._log.log(self._trt.ILogger.ERROR, reason)
            return None
        shapes = config._profiles[0]._shapes
        source = base64.b64encode(Path(network._source).read_bytes()).decode()
        return json.dumps({"onnx": source, "shapes": shapes, "types": network._types}).encode()


class Network(Object):
    kind = "INetworkDefinition"
    num_inputs = num_outputs = 1

    def _fill(self, path: str) -> None:
        proto = onnx.shape_inference.infer_shapes(onnx.load(path))
        (value,) = proto.graph.input
        dims = (-1, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]))
        self._source, self._tensor = path, SimpleNamespace(name=value.name, shape=dims)
        types = [tensor.data_type for tensor in proto.graph.initializer]
        types += [info.type.tensor_type.elem_type for info in [*proto.graph.value_info, *proto.graph.output]]
        self._types = sorted({_KINDS[kind] for kind in types if kind in _KINDS})

    @property
    def num_layers(self) -> int:
        return len(self._types)

    def get_input(self, index: int) -> Any:
        return self._tensor

    def get_layer(self, index: int) -> Any:
        output = SimpleNamespace(dtype=getattr(self._trt.DataType, self._types[index]))
        return SimpleNamespace(num_outputs=1, get_output=lambda _: output)


class Parser(Object):
    kind = "OnnxParser"

    def __init__(self, package: Package, network: Network, log: Any) -> None:
        super().__init__(package)
        self._network = network

    def parse_from_file(self, path: str) -> bool:
        if not self._trt.plan.errors:
            self._network._fill(path)
        return not self._trt.plan.errors

    @property
    def num_errors(self) -> int:
        return len(self._trt.plan.errors)

    def get_error(self, index: int) -> Any:
        return self._trt.plan.errors[index]


class Profile(Object):
    kind = "IOptimizationProfile"
    _shapes: dict[str, Any] | None = None

    def set_shape(self, name: str, smallest: Any, best: Any, largest: Any) -> None:
        self._shapes = {name: [list(smallest), list(best), list(largest)]}

    def __bool__(self) -> bool:
        (shapes,) = (self._shapes or {"": None}).values()
        return shapes is not None and shapes[0] <= shapes[1] <= shapes[2]


class Cache(Object):
    kind = "ITimingCache"

    def serialize(self) -> bytes:
        return b"timings"


class Config(Object):
    kind = "IBuilderConfig"

    def __init__(self, package: Package) -> None:
        super().__init__(package)
        self._profiles: list[Profile] = []

    def set_memory_pool_limit(self, pool: Any, limit: int) -> None:
        self._trt.plan.told.append((pool.name, limit))

    def clear_flag(self, flag: Any) -> None:
        self._trt.plan.told.append(("clear", flag.name))

    def add_optimization_profile(self, profile: Profile) -> int:
        if profile and self._trt.plan.add == 0:
            self._profiles.append(profile)
            return 0
        return -1

    def create_timing_cache(self, blob: bytes) -> Cache:
        cache = Cache(self._trt)
        cache._blob = blob
        return cache

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        fits = self._trt.plan.cache_fits or not cache._blob
        self._trt.plan.told.append(("cache", cache._blob, fits))
        return fits

    def get_timing_cache(self) -> Cache:
        return Cache(self._trt)


class Runtime(Object):
    kind = "Runtime"

    def __init__(self, package: Package, log: Any) -> None:
        super().__init__(package)
        self._log = log

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if self._trt.plan.load is not None:
            self._log.log(self._trt.ILogger.ERROR, self._trt.plan.load)
            return None
        return Engine(self._trt, json.loads(plan))


class Engine(Object):
    kind = "ICudaEngine"
    num_io_tensors = 2

    def __init__(self, package: Package, facts: dict[str, Any]) -> None:
        super().__init__(package)
        self._facts, self._session = facts, onnxruntime.InferenceSession(base64.b64decode(facts["onnx"]))
        self._io = [self._session.get_inputs()[0].name, self._session.get_outputs()[0].name]

    def get_tensor_name(self, index: int) -> str:
        return self._io[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode.INPUT if name == self._io[0] else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._trt.DataType.FLOAT

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        return self._facts["shapes"][name]

    def create_execution_context(self) -> Context | None:
        return Context(self._trt, self) if self._trt.plan.memory else None

    def create_engine_inspector(self) -> Inspector:
        inspector = Inspector(self._trt)
        inspector._facts = self._facts
        return inspector


class Inspector(Object):
    kind = "EngineInspector"

    def get_engine_information(self, form: Any) -> str:
        assert form is self._trt.LayerInformationFormat.JSON and self.execution_context._shape
        detailed = ("IBuilderConfig", "profiling_verbosity", "DETAILED") in self._trt.plan.told
        types = [self._trt.plan.built] if self._trt.plan.built else self._facts["types"]
        layers = [{"Name": "conv", "Outputs": [{"Format/Datatype": _FORMATS[kind]}]} for kind in types]
        return json.dumps({"Layers": layers if detailed else ["conv"]})


class Context(Object):
    kind = "IExecutionContext"

    def __init__(self, package: Package, engine: Engine) -> None:
        super().__init__(package)
        self._engine, self._at, self._shape = engine, {}, ()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple)
        smallest, _, largest = self._engine._facts["shapes"][name]
        self._shape = shape
        return all(low <= side <= high for low, side, high in zip(smallest, shape, largest, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._at[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape[:1] + tuple(self._engine._session.get_outputs()[0].shape[1:])

    def execute_async_v3(self, stream: int) -> bool:
        assert stream, "the default stream costs TensorRT synchronisations"
        if not self._trt.plan.enqueue:
            return False
        self._trt.plan.told.append(("execute", self._shape[0]))
        source, target = self._engine._io
        images = _memory(self._at[source], self._shape)
        _memory(self._at[target], self.get_tensor_shape(target))[:] = self._engine._session.run(None, {source: images})[
            0
        ]
        return True


def _memory(address: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape)


class Package:
    """The module itself."""

    def __init__(self, version: str, plan: Plan) -> None:
        self.__version__, self.plan = version, plan
        for kind in ("BuilderFlag", "DataType", "LayerInformationFormat", "MemoryPoolType"):
            setattr(self, kind, Enum(version, kind))
        for kind in ("NetworkDefinitionCreationFlag", "ProfilingVerbosity", "TensorIOMode"):
            setattr(self, kind, Enum(version, kind))
        levels = {name: object() for name in NAMES[version]["ILogger"] if name.isupper()}
        self.ILogger = type("ILogger", (), levels)
        self.Builder, self.Runtime, self.OnnxParser = (partial(kind, self) for kind in (Builder, Runtime, Parser))
        assert {name for name in vars(self) if name not in ("__version__", "plan")} <= set(NAMES[version]["module"])


class Graph:
    """A CUDA graph: what was enqueued while it was captured, again."""

    plan: Plan

    def __init__(self) -> None:
        self.enqueued: list[tuple[Any, Context, int]] = []

    @contextlib.contextmanager
    def capture(self, stream: Any) -> Iterator[None]:
        real = Context.execute_async_v3
        record = lambda context, number: self.enqueued.append((real, context, number)) or Graph.plan.enqueue  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Context, "execute_async_v3", record)
            yield

    def replay(self) -> None:
        for real, context, number in self.enqueued:
            assert real(context, number)


def pretend(monkeypatch: pytest.MonkeyPatch, version: str) -> Package:
    """The fake as `tensorrt`, on a machine that claims to have a GPU; tensors stay on the CPU."""
    package, engine = Package(version, Plan()), targets.find("tensorrt").module._beside("tensorrt_engine")
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    stream = SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None, synchronize=lambda: None)
    nothing = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
    for name, value in {
        "is_available": lambda: True, "get_device_name": lambda *_: "H100", "get_device_capability": lambda *_: (9, 0),
        "device": nothing, "stream": nothing, "Stream": lambda: stream, "current_stream": lambda _: stream,
        "CUDAGraph": Graph, "graph": Graph.capture,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(engine, "gpu_of", lambda device: torch.device("cpu"))
    Graph.plan = package.plan
    return package
