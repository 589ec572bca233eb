"""Export target `tensorrt`: model.engine for the GPU of this machine, and model.engine.json: what it is tied to.

Needs torch, numpy, tensorrt 10.12 or newer and an NVIDIA GPU. One path serves TensorRT 10 and 11: strongly typed, so
the precision is the one written in the ONNX (float32, float16, or int8 with symmetric Q/DQ nodes), and float32 means
it: no TF32. On the device, without anything else of okdc: python to_tensorrt.py model.onnx
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

FILE = "model.engine"
PRECISION = "fp32"
DESCRIPTION = "for TensorRT, on the kind of GPU that model.engine.json names"
ALSO = {"model.engine.json": "what model.engine is tied to, and built from"}
TOOL = "`python to_tensorrt.py model.onnx` builds model.engine on the machine that will run it"
ASKED_BY = ("trt",)
NEEDS = ("onnx",)
PACKAGES = ("tensorrt",)
LATENCY = {"cuda_graph": True}  # how `runner` is asked for when its latency is measured

_OLDEST = (10, 12)
_INSTALL = "pip install 'tensorrt>=10.12'"
# The types as the network (left) and the inspector of the built engine (right) name them.
_NETWORK_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
_ENGINE_TYPES = re.compile(
    r"\b(?:(?P<fp32>float|fp32)|(?P<fp16>half|fp16)|(?P<bf16>bf16|bfloat16)|(?P<int8>int8)|(?P<fp8>fp8))\b",
    re.IGNORECASE,
)


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    if importlib.util.find_spec("torch") is None:
        return "TensorRT inference needs torch: pip install torch"
    import torch

    # Before tensorrt is imported: without a device its runtime ends the process with a segmentation fault.
    if not torch.cuda.is_available():
        return (
            "TensorRT needs an NVIDIA GPU and torch sees none: "
            "copy to_tensorrt.py and model.onnx to the device and type there: python to_tensorrt.py model.onnx"
        )
    try:
        import tensorrt
    except ImportError as error:
        return f"TensorRT cannot be imported ({error}): {_INSTALL}"
    if _version(tensorrt.__version__) < _OLDEST:
        return f"TensorRT {tensorrt.__version__} is too old: {_INSTALL}"
    return None


def write(
    student: torch.nn.Module | None,
    example: torch.Tensor | None,
    path: str | Path,
    *,
    onnx: str | Path | None = None,
    profile: tuple[int, int, int] = (1, 8, 32),
    workspace: int = 4 << 30,
    timing_cache: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write the engine of the ONNX file `onnx`, from which alone it is built, and its sidecar; say what was built.

    The precision is the graph's; a `path` such as model.fp16.engine promises it, and an engine without it is refused.
    `profile`: smallest, best and largest batch; `workspace`: bytes that a layer may use; `timing_cache`: file that
    makes the next build fast, in the user's cache by default; `device`: the GPU that it is for, the first for "cpu".
    Raises RuntimeError when TensorRT is not available, refuses the graph, or builds it in another precision than asked.
    """
    trt = _tensorrt()
    if onnx is None:
        raise RuntimeError("An engine is built from ONNX: give onnx=path of a model.onnx, or export with --onnx too.")
    import torch

    started, path, source = time.perf_counter(), Path(path), Path(onnx)
    gpu = _gpu(device)
    here = _here(trt, gpu)
    with torch.cuda.device(gpu):  # TensorRT builds for the GPU that is current
        plan, asked, shapes = _build(trt, source, profile, workspace, Path(timing_cache or _default_cache(here)))
        built = _built_precisions(trt, plan)
    _check_precisions(asked | _promised(path), built)
    sidecar = {
        **here,
        "profile": shapes,
        "precisions": built,
        "onnx": source.name,
        "onnx_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "engine_sha256": hashlib.sha256(plan).hexdigest(),
    }
    _write_bytes(path, plan)
    _write_bytes(_sidecar(path), (json.dumps(sidecar, indent=2, sort_keys=True) + "\n").encode())
    seconds = round(time.perf_counter() - started, 2)
    return {"path": "tensorrt", "dynamic_batch": True, "bytes": len(plan), "seconds": seconds, **sidecar}


def runner(
    path: str | Path, device: str = "cpu", threads: int | None = None, *, cuda_graph: bool = False
) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32 on TensorRT; `.provider` says so, `.infer` takes tensors.

    `.precisions` counts the engine's layers by number type, `.device` is the GPU: an engine always runs on one, the
    first where `device` is "cpu". `cuda_graph` replays one captured graph per shape. Raises RuntimeError with the
    command that rebuilds when the engine is of another TensorRT or another GPU.
    """
    trt, gpu = _tensorrt(), _gpu(device)
    return _Engine(trt, Path(path), _read_engine(Path(path), _here(trt, gpu)), gpu, cuda_graph)


# ---- building


def _build(
    trt: Any,
    source: Path,
    batches: tuple[int, int, int],
    workspace: int,
    cache: Path | None,
    adjust: Callable[[Any, Any], None] = lambda trt, config: None,
) -> tuple[bytes, set[str], dict[str, list[list[int]]]]:
    """The serialised engine, the precisions that the graph asks for, and the profile by input name.

    adjust: what to_tensorrt_rtx.py, which builds by this, has to say to the builder's configuration.
    """
    log = _logger(trt)
    builder = trt.Builder(log)
    # TensorRT 11 is always strongly typed; the number behind the name differs between 10 and 11.
    typed = 0 if _version(trt.__version__) >= (11,) else 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        raise RuntimeError(_parser_errors(source, (parser.get_error(i) for i in range(parser.num_errors))))
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and costs float32 three digits
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector reads the precisions from this
    adjust(trt, config)
    shapes = _add_profile(builder, network, config, batches)
    if cache is not None:
        _use_cache(config, cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT cannot build {source.name}: {_last(log.errors)}")
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time, not the engine
        if cache is not None:
            _write_bytes(cache, bytes(memoryview(config.get_timing_cache().serialize())))
    return bytes(memoryview(plan)), _asked_precisions(network), shapes


def _use_cache(config: Any, cache: Path) -> None:
    timings = config.create_timing_cache(cache.read_bytes() if cache.exists() else b"")
    if timings is None or not config.set_timing_cache(timings, False):  # of another GPU or version: start afresh
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _add_profile(builder: Any, network: Any, config: Any, batches: tuple[int, int, int]) -> dict[str, list[list[int]]]:
    """Let the batch of the one input range over `batches`."""
    if network.num_inputs != 1 or network.num_outputs != 1:
        raise RuntimeError(f"The ONNX has {network.num_inputs} inputs and {network.num_outputs} outputs, not one each.")
    tensor = network.get_input(0)
    shapes = [[batch, *tuple(tensor.shape)[1:]] for batch in batches]
    profile = builder.create_optimization_profile()
    profile.set_shape(tensor.name, *shapes)
    if not profile or config.add_optimization_profile(profile) < 0:
        raise RuntimeError(
            f"TensorRT refuses profile={batches}: give the smallest, best and largest batch, such as (1, 8, 32)."
        )
    return {tensor.name: shapes}


def _asked_precisions(network: Any) -> set[str]:
    """The number types of the parsed graph: strongly typed, they are the ones that the ONNX asks for."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    names = {layer.get_output(i).dtype.name for layer in layers for i in range(layer.num_outputs)}
    return {_NETWORK_TYPES[name] for name in names if name in _NETWORK_TYPES}


def _built_precisions(trt: Any, plan: bytes) -> dict[str, int]:
    """How many layers of the engine just built use each number type."""
    log = _logger(trt)
    runtime = trt.Runtime(log)  # must live as long as the engine
    return _precisions(trt, _load(runtime, plan, log, "the engine just built"))


def _precisions(trt: Any, engine: Any) -> dict[str, int]:
    context, name = _context(engine), _names(trt, engine)[0]
    context.set_input_shape(name, tuple(engine.get_tensor_profile_shape(name, 0)[1]))
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context  # without shapes the formats of a dynamic engine are not told
    return _layer_precisions(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


# ---- running


class _Engine:
    """A TensorRT engine as a function; torch owns the memory and the stream."""

    def __init__(self, trt: Any, path: Path, plan: bytes, gpu: torch.device, cuda_graph: bool) -> None:
        import torch

        self._device = gpu
        with torch.cuda.device(gpu):
            self._log = _logger(trt)  # must outlive the runtime
            self._runtime = trt.Runtime(self._log)
            engine = _load(self._runtime, plan, self._log, f"{path} ({_rebuild(path.with_suffix('.onnx'))})")
            self._engine, self._context = engine, _context(engine)
            self._stream = torch.cuda.Stream()
            self.precisions = _precisions(trt, engine)
        if not _promised(path) <= set(self.precisions):
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
            raise RuntimeError(f"TensorRT did not run the engine: {_last(self._log.errors)}")


def _load(runtime: Any, plan: bytes, log: Any, name: str) -> Any:
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(f"TensorRT cannot load {name}: {_last(log.errors)}")
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


# ---- TensorRT and the machine


def _tensorrt() -> Any:
    """The tensorrt package, or RuntimeError with the reason why not."""
    reason = available()
    if reason:
        raise RuntimeError(reason)
    import tensorrt

    return tensorrt


def _logger(trt: Any) -> Any:
    """A logger that keeps what went wrong: TensorRT's own calls only return None, False or -1."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def _here(trt: Any, gpu: torch.device) -> dict[str, Any]:
    """What an engine for this GPU of this machine is tied to."""
    import torch

    capability = ".".join(str(number) for number in torch.cuda.get_device_capability(gpu))
    name = torch.cuda.get_device_name(gpu)
    return {"tensorrt": trt.__version__, "cuda": torch.version.cuda, "gpu": name, "compute_capability": capability}


def _gpu(device: str) -> torch.device:
    import torch

    return torch.device("cuda:0" if device == "cpu" else device)


# ---- pure helpers


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _default_cache(here: dict[str, Any]) -> Path:
    """One file per TensorRT and kind of GPU, as timings of another are of no use."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "okdc"
    return folder / f"tensorrt-{here['tensorrt']}-sm{here['compute_capability']}.timing"


def _parser_errors(source: Path, errors: Iterable[Any]) -> str:
    lines = []
    for error in errors:
        place = f" (node {error.node_name()!r}, {error.node_operator()})" if error.node_name() else ""
        lines.append(f"{error.desc()}{place}")
    return f"TensorRT cannot parse {source}: {'; '.join(lines) or 'no reason given'}."


def _layer_precisions(information: str) -> dict[str, int]:
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


def _promised(path: Path) -> set[str]:
    """The precision in the name of an engine, such as fp16 in model.fp16.engine."""
    return {"fp16", "int8"} & set(path.name.split("."))


def _check_precisions(asked: set[str], built: dict[str, int]) -> None:
    """fp32 is everywhere (inputs, logits, scales); what counts is which cheaper types are there."""
    if not built:
        raise RuntimeError("The inspector names no precision for any layer of the engine, so it cannot be trusted.")
    wanted, found = asked - {"fp32"}, set(built) - {"fp32"}
    if wanted != found:
        names = [", ".join(sorted(types)) or "fp32" for types in (wanted, found)]
        raise RuntimeError(f"The ONNX asks for {names[0]} layers, and TensorRT built an engine with {names[1]} layers.")


def _read_engine(path: Path, here: dict[str, Any]) -> bytes:
    """The engine's bytes, if its sidecar says that it belongs to this machine and to the ONNX beside it."""
    rebuild = _rebuild(path.with_suffix(".onnx"))
    try:
        plan, sidecar = path.read_bytes(), json.loads(_sidecar(path).read_text())
        source = path.with_name(sidecar["onnx"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"The engine and its sidecar cannot be read: {error}. {rebuild}") from error
    rebuild = _rebuild(source)
    for key in ("tensorrt", "compute_capability", "gpu"):
        if sidecar.get(key) != here[key]:
            raise RuntimeError(f"{path} is for {key} {sidecar.get(key)}, and here it is {here[key]}. {rebuild}")
    if sidecar.get("engine_sha256") != hashlib.sha256(plan).hexdigest():
        raise RuntimeError(f"{path} is not the engine that its {_sidecar(path).name} describes. {rebuild}")
    if source.is_file() and sidecar.get("onnx_sha256") != hashlib.sha256(source.read_bytes()).hexdigest():
        raise RuntimeError(f"{path} was built from another {source.name} than the one beside it. {rebuild}")
    return plan


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _rebuild(source: Path) -> str:
    return f"Build it here: python {Path(__file__)} {source}"


def _last(errors: list[str]) -> str:
    return errors[-1].strip() if errors else "no reason given"


def _write_bytes(path: Path, data: bytes) -> None:
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


def _batches(path: Path) -> tuple[int, int, int]:
    """The batches of the engine that is built anew: a server may have been promised them."""
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        ((smallest, usual, largest),) = json.loads(_sidecar(path).read_text())["profile"].values()
        return smallest[0], usual[0], largest[0]
    return 1, 8, 32


def _settle(path: Path) -> None:
    """In a bundle: Triton's copy of the engine, and the check sums of what is this machine's own from now on."""
    bundle = path.parent
    served = [*bundle.glob("triton/*_tensorrt/1/model.plan")] if path.name == "model.engine" else []
    for plan in served:
        _write_bytes(plan, path.read_bytes())
    sums = bundle / "SHA256SUMS"
    if sums.is_file():
        files = {file.relative_to(bundle).as_posix(): file for file in (path, _sidecar(path), *served)}
        kept = [line for line in sums.read_text().splitlines() if line.partition("  ")[2] not in files]
        new = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {name}" for name, file in files.items()]
        _write_bytes(sums, "".join(f"{line}\n" for line in [*kept, *new]).encode())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python to_tensorrt.py model.onnx", file=sys.stderr)
        sys.exit(2)
    try:
        engine = Path(sys.argv[1]).with_suffix(".engine")
        print(json.dumps(write(None, None, engine, onnx=sys.argv[1], profile=_batches(engine)), indent=2))
        _settle(engine)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
