"""Runners in a process of their own, to be timed, or for their answers: what dies there ends that process alone.

Backends that spin their threads slow each other down by up to three times when they share a process, and some die of
a signal on some processors. This file is also the script of that process, which must not import torch or okdc.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from okdc.verification.schema import Latency

# -P: the script's own folder holds modules whose names must not shadow other people's.
_COMMAND = [sys.executable, "-P", str(Path(__file__).resolve())]
_CLOCK = Path(__file__).with_name("latency.py")


def measure_alone(
    module: str,
    file: Path,
    device: str,
    images: np.ndarray,
    batch_sizes: Sequence[int],
    threads: int,
    options: Mapping[str, Any] | None = None,
) -> list[Latency]:
    """`latency.measure` of the runner in `module` in a process of its own.

    module: the file of an export target or a runtime, which is no part of any package, or the name of a module that can
    be imported. options: further keywords of the runner; when not given, those in the module's LATENCY, where it has
    that. Raises RuntimeError with the last line of what that process said when it failed, or its signal.
    """
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # read when the libraries are loaded
    environment = os.environ | dict.fromkeys(variables, str(threads))
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "images.npy"
        np.save(saved, images, allow_pickle=False)
        paths = {"module": module, "file": str(file), "images": str(saved)}
        clock = {"clock": str(_CLOCK), "batch_sizes": list(batch_sizes)}
        job = paths | clock | {"device": device, "threads": threads, "options": options and dict(options)}
        done = subprocess.run(
            _COMMAND, input=json.dumps(job) + "\n", env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        said = done.stderr.strip().splitlines() if done.returncode > 0 else []
        raise RuntimeError((said or [_ended(done.returncode)])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def precisions(module: str) -> tuple[str, ...]:
    """What the function `precisions` of a runtime's file says; RuntimeError with why not, or the signal it died of."""
    with _Process({"module": module}) as process:
        return tuple(process.answer()[0]["precisions"])


class Alone:
    """The runner in a file, in a process of its own that ends with this object: (B, C, H, W) float32 -> (B, classes).

    `.provider` is the runner's. Raises RuntimeError for what the runner raises, and names the signal that ended it.
    """

    def __init__(self, module: str, file: Path, device: str, options: Mapping[str, Any]) -> None:
        job = {"module": module, "file": str(file), "device": device, "threads": None, "options": dict(options)}
        self._process = _Process(job)
        weakref.finalize(self, self._process.end)
        self.provider = str(self._process.answer()[0]["provider"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self._process.ask(images)
        _, logits = self._process.answer()
        assert logits is not None
        return logits


class _Process:
    """That process, seen from here: a line of json each way, and the numbers that it announces behind it."""

    def __init__(self, job: dict[str, Any]) -> None:
        pipe = subprocess.PIPE
        self._popen = subprocess.Popen(_COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._send({"job": job})

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, images: np.ndarray) -> None:
        self._send({}, images)

    def _send(self, said: dict[str, Any], images: np.ndarray | None = None) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: `answer` says of what
            _send(self._popen.stdin, said, images)

    def answer(self) -> tuple[dict[str, Any], np.ndarray | None]:
        assert self._popen.stdout is not None
        found = _receive(self._popen.stdout)
        if found is None:
            raise RuntimeError(_ended(self._popen.wait()))
        if "error" in found[0]:
            raise RuntimeError(found[0]["error"])
        return found

    def end(self) -> None:
        """Close its input, after which it ends; kill it where it does not."""
        for stream in (self._popen.stdin, self._popen.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream and stream.close()
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


def _ended(code: int) -> str:
    """How a process ended that did not say so itself."""
    return (
        f"its process died of {signal.Signals(-code).name}" if code < 0 else f"its process ended with exit code {code}"
    )


def _send(stream: IO[bytes], said: dict[str, Any], numbers: np.ndarray | None = None) -> None:
    shape = None if numbers is None else numbers.shape
    stream.write(json.dumps(said | {"shape": shape}).encode() + b"\n")
    if numbers is not None:
        stream.write(np.ascontiguousarray(numbers, dtype=np.float32).tobytes())
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict[str, Any], np.ndarray | None] | None:
    """What was sent; None where the other process is gone."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    said = json.loads(line)
    if said["shape"] is None:
        return said, None
    wanted = 4 * int(np.prod(said["shape"], dtype=np.int64))
    data = stream.read(wanted)
    return (said, np.frombuffer(data, dtype=np.float32).reshape(said["shape"])) if len(data) == wanted else None


def main() -> None:
    """Do what the job on the first line of stdin says: time a runner, or answer until stdin ends."""
    job = json.loads(sys.stdin.buffer.readline())
    if "job" in job:
        _serve(job["job"])
        return
    module = _loaded(job["module"])
    options = getattr(module, "LATENCY", {}) if job["options"] is None else job["options"]
    run = module.runner(Path(job["file"]), device=job["device"], threads=job["threads"], **options)
    images = np.load(job["images"], allow_pickle=False)
    on_cpu = job["threads"] if job["device"] == "cpu" else None
    print(json.dumps(_loaded(job["clock"]).measure(run, images, job["batch_sizes"], on_cpu)))


def _serve(job: dict[str, Any]) -> None:
    with open(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever a backend prints must not come between the answers
        try:
            module = _loaded(job["module"])
            if "file" not in job:
                _send(answers, {"precisions": module.precisions()})
                return
            run = module.runner(Path(job["file"]), device=job["device"], threads=job["threads"], **job["options"])
            _send(answers, {"provider": getattr(run, "provider", "")})
            while (asked := _receive(sys.stdin.buffer)) is not None:
                _send(answers, {}, np.asarray(run(asked[1])))
        except BrokenPipeError:
            pass  # nobody listens any more
        except Exception as error:  # a backend may raise anything, and the row that it fails tells it
            _send(answers, {"error": str(error) or type(error).__name__})


def _loaded(module: str) -> ModuleType:
    """The module of that name or in that file, which finds the files beside it as those of its package."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module)
    package = ModuleType(f"folder_{len(sys.modules)}")
    package.__path__ = [str(path.parent)]
    sys.modules[package.__name__] = package
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    main()
