"""Engines of TensorRT and of TensorRT for RTX, which share an API: run on torch's memory, kept with a sidecar.

Used by to_tensorrt.py, to_tensorrt_rtx.py and tensorrt_build.py. `trt` is the package of either.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

# As the inspector of a built engine names the number types.
_ENGINE_TYPES = re.compile(
    r"\b(?:(?P<fp32>float|fp32)|(?P<fp16>half|fp16)|(?P<bf16>bf16|bfloat16)|(?P<int8>int8)|(?P<fp8>fp8))\b",
    re.IGNORECASE,
)


class Engine:
    """A TensorRT engine as a function; torch owns the memory and the stream."""

    def __init__(
        self, trt: Any, path: Path, plan: bytes, gpu: torch.device, rebuild: str, cuda_graph: bool = False
    ) -> None:
        import torch

        self._device = gpu
        with torch.cuda.device(gpu):
            self._log = logger(trt)  # must outlive the runtime
            self._runtime = trt.Runtime(self._log)
            engine = _load(self._runtime, plan, self._log, f"{path} ({rebuild})")
            self._engine, self._context = engine, _context(engine)
            self._stream = torch.cuda.Stream()
            self.precisions = _precisions(trt, engine)
        if not promised(path) <= set(self.precisions):
            raise RuntimeError(f"{path} has no layer in the precision of its name, only {', '.join(self.precisions)}.")
        self._input, self._output = _names(trt, engine)
        types = {trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16}
        self._types = types[engine.get_tensor_dtype(self._input)], types[engine.get_tensor_dtype(self._output)]
        self._largest = engine.get_tensor_profile_shape(self._input, 0)[2][0]
        self._graphs: dict[tuple[int, ...], tuple[Any, ...]] | None = {} if cuda_graph else None
        self.device = str(self._device)
        self.provider = f"TensorRT {trt.__version__} on {torch.cuda.get_device_name(self._device)}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        import torch

        parts = torch.from_numpy(images).split(self._largest)
        return torch.cat([self.infer(part.to(self._device)).float() for part in parts]).cpu().numpy()

    def infer(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, classes) of images (B, C, H, W) on the GPU, without waiting for them."""
        import torch

        images = images.to(self._device, self._types[0]).contiguous()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)  # TensorRT must not use the default stream
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            logits = self._run(images) if self._graphs is None else self._replay(images)
        images.record_stream(self._stream)
        logits.record_stream(current)
        current.wait_stream(self._stream)
        return logits

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        logits = self._bind(self._context, images)
        self._enqueue(self._context)
        return logits

    def _replay(self, images: torch.Tensor) -> torch.Tensor:
        assert self._graphs is not None
        shape = tuple(images.shape)
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(images)
        graph, static_images, static_logits, _ = self._graphs[shape]
        static_images.copy_(images)
        graph.replay()
        return static_logits.clone()

    def _capture(self, images: torch.Tensor) -> tuple[Any, ...]:
        import torch

        context = _context(self._engine)  # its own: a graph keeps the addresses of the context it was captured from
        static_images = images.clone()
        static_logits = self._bind(context, static_images)
        for _ in range(2):  # TensorRT puts off work to the first run of a new shape
            self._enqueue(context)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._enqueue(context)
        return graph, static_images, static_logits, context

    def _bind(self, context: Any, images: torch.Tensor) -> torch.Tensor:
        """Give the context its input, and the memory of its output, which is returned."""
        import torch

        if not context.set_input_shape(self._input, tuple(images.shape)):
            shapes = self._engine.get_tensor_profile_shape(self._input, 0)
            smallest, _, largest = (tuple(shape) for shape in shapes)
            raise RuntimeError(f"The engine takes images from {smallest} to {largest}, not {tuple(images.shape)}.")
        context.set_tensor_address(self._input, images.data_ptr())
        logits = torch.empty(tuple(context.get_tensor_shape(self._output)), dtype=self._types[1], device=self._device)
        context.set_tensor_address(self._output, logits.data_ptr())
        return logits

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):  # unchecked, stale logits would be returned
            raise RuntimeError(f"TensorRT did not run the engine: {last(self._log.errors)}")


def _load(runtime: Any, plan: bytes, log: Any, name: str) -> Any:
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(f"TensorRT cannot load {name}: {last(log.errors)}")
    return engine


def _names(trt: Any, engine: Any) -> tuple[str, str]:
    """The names of the input and of the output."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    image = next(name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
    return image, next(name for name in names if name != image)


def _context(engine: Any) -> Any:
    context = engine.create_execution_context()
    if context is None:
        raise RuntimeError("There is not enough GPU memory for the engine: end what else runs on this GPU.")
    return context


def built_precisions(trt: Any, plan: bytes) -> dict[str, int]:
    """How many layers of the engine just built use each number type."""
    log = logger(trt)
    runtime = trt.Runtime(log)  # must live as long as the engine
    return _precisions(trt, _load(runtime, plan, log, "the engine just built"))


def _precisions(trt: Any, engine: Any) -> dict[str, int]:
    context, name = _context(engine), _names(trt, engine)[0]
    context.set_input_shape(name, tuple(engine.get_tensor_profile_shape(name, 0)[1]))
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context  # without shapes the formats of a dynamic engine are not told
    return layer_precisions(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def layer_precisions(information: str) -> dict[str, int]:
    """Layers per number type in the inspector's JSON; a layer that mixes types counts for each."""
    count: Counter[str] = Counter()
    for layer in json.loads(information)["Layers"]:
        if not isinstance(layer, dict):
            raise RuntimeError("The engine does not tell its precisions: it was built without detailed profiling.")
        tensors = [*layer.get("Inputs", ()), *layer.get("Outputs", ())]
        texts = [str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))) for tensor in tensors]
        texts.append(str(layer.get("Weights", "")))
        count.update({str(match.lastgroup) for text in texts for match in _ENGINE_TYPES.finditer(text)})
    return dict(sorted(count.items()))


def promised(path: Path) -> set[str]:
    """The precision in the name of an engine, such as fp16 in model.fp16.engine."""
    return {"fp16", "int8"} & set(path.name.split("."))


def write(path: Path, plan: bytes, source: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write an engine and its sidecar, what is said of it and of the ONNX that it was built from; returns that."""
    told = {
        **facts,
        "onnx": source.name,
        "onnx_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "engine_sha256": hashlib.sha256(plan).hexdigest(),
    }
    write_bytes(path, plan)
    write_bytes(sidecar(path), (json.dumps(told, indent=2, sort_keys=True) + "\n").encode())
    return told


def read(path: Path, here: Mapping[str, Any], rebuild: Callable[[Path], str]) -> bytes:
    """The engine's bytes, if its sidecar says that it belongs to what is `here` and to the ONNX beside it.

    rebuild: a sentence that says how it is built again from that ONNX. Raises RuntimeError.
    """
    again = rebuild(path.with_suffix(".onnx"))
    try:
        plan, told = path.read_bytes(), json.loads(sidecar(path).read_text())
        source = path.with_name(told["onnx"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"The engine and its sidecar cannot be read: {error}. {again}") from error
    again = rebuild(source)
    for key, value in here.items():
        if told.get(key) != value:
            raise RuntimeError(f"{path} is for {key} {told.get(key)}, and here it is {value}. {again}")
    if told.get("engine_sha256") != hashlib.sha256(plan).hexdigest():
        raise RuntimeError(f"{path} is not the engine that its {sidecar(path).name} describes. {again}")
    if source.is_file() and told.get("onnx_sha256") != hashlib.sha256(source.read_bytes()).hexdigest():
        raise RuntimeError(f"{path} was built from another {source.name} than the one beside it. {again}")
    return plan


def sidecar(path: Path) -> Path:
    """Where it is told what an engine is for."""
    return path.with_name(path.name + ".json")


def logger(trt: Any) -> Any:
    """The logger of this process, without what it kept before: TensorRT goes on using the first that it is given.

    It keeps what went wrong, as TensorRT's own calls only return None, False or -1.
    """
    log = _logger(trt)
    log.errors.clear()
    return log


@cache
def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def gpu_of(device: str) -> torch.device:
    import torch

    return torch.device("cuda:0" if device == "cpu" else device)


def last(errors: list[str]) -> str:
    return errors[-1].strip() if errors else "no reason given"


def write_bytes(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
