"""Export target `torch`: model.pt2, a torch.export graph with a dynamic batch that runs without the Python code.

Needs torch and numpy; timm only for networks that it can re-parameterise.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import os
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

FILE = "model.pt2"
DESCRIPTION = "the network as a program that torch alone can run"
ROW = "torch.export"  # "torch" is the student itself

# What torch.export.save writes for a network of plain tensors; anything else in an archive could be made to run code.
_PLAIN = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json|extra/metadata\.json"
    r"|archive_format|archive_version|byteorder|version|\.data/\w+"
)


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    return None if importlib.util.find_spec("torch") else "torch.export needs torch: pip install torch"


def write(
    student: torch.nn.Module,
    example: torch.Tensor,
    path: str | Path,
    *,
    metadata: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Write `student` in eval mode, float32, (batch, C, H, W) -> (batch, classes), and say what was written.

    Only the shape of `example` (B, C, H, W) is used, and `student` is left untouched. Raises RuntimeError, and leaves
    what was at `path` alone, when torch.export cannot capture the network.
    """
    import torch

    started = time.perf_counter()
    network = _reparameterized(copy.deepcopy(student).to("cpu", torch.float32).eval())
    images = torch.zeros(2, *example.shape[1:])  # two: a batch of one would be taken for a constant
    archive = io.BytesIO()
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
            _forget_paths(program)
            extra = {"metadata.json": json.dumps(metadata or {}, sort_keys=True)}
            torch.export.save(program, archive, extra_files=extra)
    except Exception as error:  # torch.export raises anything
        reason = (str(error).splitlines() or [""])[0]
        raise RuntimeError(f"torch.export cannot capture this network. {type(error).__name__}: {reason}") from error
    _write_bytes(Path(path), archive.getvalue())
    return {
        "path": "torch.export",
        "nodes": len(program.graph.nodes),
        "dynamic_batch": True,
        "bytes": Path(path).stat().st_size,
        "seconds": round(time.perf_counter() - started, 2),
    }


def runner(path: str | Path, device: str = "cpu", threads: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32; `.provider` is the torch device in use.

    torch.export.load unpickles whatever an archive declares as pickled, so an archive that holds more than plain
    tensors is refused with RuntimeError before it is loaded. Its shape expressions still go through sympy: for files
    of strangers, prefer ONNX.
    """
    return _Program(Path(path), device, threads)


class _Program:
    """A loaded torch.export program as a function."""

    def __init__(self, path: Path, device: str, threads: int | None) -> None:
        import torch
        from torch.export.passes import move_to_device_pass

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise RuntimeError(f"torch sees no CUDA device, so {path.name} cannot run on {device}: use the cpu device.")
        _refuse_pickles(path)
        with _quiet():
            program = torch.export.load(path)
        if device != "cpu":
            program = move_to_device_pass(program, device)
        self._network, self._device, self._threads = program.module(), device, threads
        self.provider = str(torch.device(device))

    def __call__(self, images: np.ndarray) -> np.ndarray:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self._threads or before)
        try:
            # float32 means it here too: TF32 would cost three digits, ten times what is tolerated.
            with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                return self._network(torch.from_numpy(images).to(self._device)).cpu().numpy()
        finally:
            torch.set_num_threads(before)


def _refuse_pickles(path: Path) -> None:
    """Raise RuntimeError if loading the archive would unpickle anything but plain tensors."""
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                inner = name.partition("/")[2]  # the first folder is the archive's own name
                if not _PLAIN.fullmatch(inner):
                    raise ValueError(f"it holds {inner}")
                if inner.endswith("_config.json"):
                    entries = json.loads(archive.read(name))["config"].items()
                    pickled = [key for key, entry in entries if entry["use_pickle"]]
                    if pickled:
                        raise ValueError(f"it holds pickled {pickled[0]}")
                if inner.startswith("data/sample_inputs/"):
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except Exception as error:
        raise RuntimeError(f"{path} is not a plain {FILE} and is not loaded: {error}. Export it again.") from error


def _reparameterized(network: torch.nn.Module) -> torch.nn.Module:
    """The network with its parallel branches fused where timm knows how (MobileOne, FastViT, RepVGG, LeViT, ...)."""
    if importlib.util.find_spec("timm") is None:
        return network
    from timm.utils import reparameterize_model

    return reparameterize_model(network, inplace=True).eval()


def _forget_paths(program: torch.export.ExportedProgram) -> None:
    """Drop the stack traces of the graph's nodes: they name files of this machine."""
    import torch

    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no log lines of torch.export; everything is as before afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


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
