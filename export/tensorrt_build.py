"""Building an engine from ONNX, by the API that TensorRT and TensorRT for RTX share.

Used by to_tensorrt.py and to_tensorrt_rtx.py; needs tensorrt_engine.py beside it. `trt` is the package of either.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

# The number types as the network names them.
NETWORK_TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}


def build(
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
    shared = _engine()
    log = shared.logger(trt)
    builder = trt.Builder(log)
    # TensorRT 11 is always strongly typed; the number behind the name differs between 10 and 11.
    strongly = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    typed = 0 if shared.version(trt.__version__) >= (11,) else 1 << int(strongly)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        raise RuntimeError(parser_errors(source, (parser.get_error(i) for i in range(parser.num_errors))))
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
        raise RuntimeError(f"TensorRT cannot build {source.name}: {shared.last(log.errors)}")
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time, not the engine
        if cache is not None:
            shared.write_bytes(cache, bytes(memoryview(config.get_timing_cache().serialize())))
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
    return {NETWORK_TYPES[name] for name in names if name in NETWORK_TYPES}


def parser_errors(source: Path, errors: Iterable[Any]) -> str:
    lines = []
    for error in errors:
        place = f" (node {error.node_name()!r}, {error.node_operator()})" if error.node_name() else ""
        lines.append(f"{error.desc()}{place}")
    return f"TensorRT cannot parse {source}: {'; '.join(lines) or 'no reason given'}."


def _engine() -> ModuleType:
    return importlib.import_module(".tensorrt_engine" if __package__ else "tensorrt_engine", __package__)
