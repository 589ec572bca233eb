"""Runtime `onnxruntime_web`: ONNX files in onnxruntime-web, the engine of browsers, in WebAssembly on node.

Needs numpy, Node.js, and onnxruntime-web where node finds it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

NAME = "onnxruntime-web"

# Reads four sides and that many numbers; answers with a line of JSON and the numbers of the shape in it.
_PROGRAM = """
console.log = console.error;
const fs = require("fs"), ort = require(process.argv[1]);

function read(count) {
  const bytes = new Uint8Array(count);
  for (let got = 0, more; got < count; got += more) {
    more = fs.readSync(0, bytes, got, count - got, null);
    if (more === 0) process.exit();
  }
  return bytes.buffer;
}

function answer(said, numbers = new Float32Array()) {
  const bytes = Buffer.concat([Buffer.from(JSON.stringify(said) + "\\n"), Buffer.from(numbers.slice().buffer)]);
  for (let sent = 0; sent < bytes.length; ) sent += fs.writeSync(1, bytes, sent);
}

async function main(path, threads) {
  ort.env.wasm.numThreads = Number(threads);
  const session = await ort.InferenceSession.create(path, { logSeverityLevel: 3 });
  answer(ort.env.versions);
  for (;;) {
    const sides = [...new Int32Array(read(16))];
    const images = new ort.Tensor("float32", new Float32Array(read(4 * sides.reduce((a, b) => a * b))), sides);
    const logits = (await session.run({ [session.inputNames[0]]: images }))[session.outputNames[0]];
    const { user, system } = process.cpuUsage();
    answer({ shape: logits.dims, seconds: (user + system) / 1e6 }, logits.data);
  }
}

main(...process.argv.slice(2)).catch((error) => {
  answer({ error: String(error.message || error) });
  process.exit(1);
});
"""


def available() -> str | None:
    """None, or one sentence that says what is missing and what to type."""
    if shutil.which("node") is None:
        return "onnxruntime-web runs on node here, which is not installed: install Node.js 18 or newer"
    command = ["node", "-e", f"require.resolve({NAME!r})"]
    if subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
        return "node finds no onnxruntime-web: npm install onnxruntime-web, in the folder where you type this"
    return None


def precisions() -> tuple[str, ...]:
    """The number types that it computes in: those of the file."""
    return ("fp32",)


def runner(
    path: str | Path, device: str = "cpu", threads: int | None = None, precision: str = "fp32"
) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32; `.provider` names the version.

    threads: one where it is not given, as on pages that are not isolated from other sites. `.process_time()` is the
    processor time (s) of both processes. Raises RuntimeError with what onnxruntime-web says.
    """
    if (device, precision) != ("cpu", "fp32"):
        raise RuntimeError(f"onnxruntime-web computes as the file says on cpu here, not in {precision} on {device!r}.")
    return _Node(NAME, Path(path), threads or 1)


class _Node:
    """A file in a package of npm's, run by a process of node's that ends with this object."""

    def __init__(self, package: str, path: Path, threads: int) -> None:
        pipe, command = subprocess.PIPE, ["node", "-e", _PROGRAM, package, str(path), str(threads)]
        self._popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, self._popen)
        self._seconds = 0.0
        versions = self._answer()
        self.provider = f"{package} {versions.get('web') or versions.get('node')}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        import numpy as np

        assert self._popen.stdin and self._popen.stdout
        self._popen.stdin.write(np.array(images.shape, dtype=np.int32).tobytes())
        self._popen.stdin.write(np.ascontiguousarray(images, dtype=np.float32).tobytes())
        self._popen.stdin.flush()
        told = self._answer()
        self._seconds = told["seconds"]
        data = self._popen.stdout.read(4 * int(np.prod(told["shape"])))
        return np.frombuffer(data, dtype=np.float32).reshape(told["shape"])

    def process_time(self) -> float:
        """What node and this process have used of a processor, in seconds."""
        return time.process_time() + self._seconds

    def _answer(self) -> dict[str, Any]:
        assert self._popen.stdout
        line = self._popen.stdout.readline()
        told = json.loads(line) if line else {"error": f"node ended with exit code {self._popen.wait()}"}
        if "error" in told:
            raise RuntimeError(told["error"])
        return told


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close its input, after which it ends, and wait for that."""
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()
    process.wait()
