"""Runs okdc's command line in processes that are killed, or whose disk fails, at a chosen place.

`python -m tests.helpers.crashing` is a server: it imports everything once and forks a process for every command that it
reads.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TIMEOUT = 300  # seconds after which a command is taken to hang


@dataclass(frozen=True)
class Accident:
    """What happens to a process: `what` at the `at`-th time that it could, or `delay` seconds after.

    step: SIGKILL from outside when the line of step `at` (of all steps of the run) has been printed.
    SIGTERM, SIGINT: the same, with that signal to the whole process group, as a scheduler or a terminal sends it.
    worker killed, worker stopped: the same, with SIGKILL or SIGSTOP to a data worker.
    rank killed: the same, with SIGKILL to one of the processes that train together.
    file: SIGKILL just before the `at`-th time that a file of the run is opened for writing, linked, renamed or removed.
    export: the same, of the files that a bundle is put together of.
    torn: SIGKILL when only the part `part` of the `at`-th file that is synced has been written.
    full, read-only: from the `at`-th of those times on nothing more fits on the disk, or nothing can be written.
    """

    what: str
    at: int
    delay: float = 0.0
    part: float = 0.0


OUTSIDE = ("step", "SIGTERM", "SIGINT", "worker killed", "worker stopped", "rank killed")


class Server:
    """The other side of the pipe; a context manager."""

    def __enter__(self) -> Server:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "tests.helpers.crashing"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(line, stdin=pipe, stdout=pipe, env=environment, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)
        assert self.process.stdout
        self.process.stdout.close()

    def run(self, words: list[str], folder: Path, accident: Accident | None = None) -> tuple[int | None, str]:
        """Exit code (None: it hung) and output of `okdc WORDS` in `folder`, to which `accident` happens."""
        assert self.process.stdin and self.process.stdout
        given = asdict(accident) if accident else None
        print(json.dumps([words, str(folder), given]), file=self.process.stdin, flush=True)
        code = json.loads(self.process.stdout.readline())
        return code, (folder / "log.txt").read_text()


def serve() -> None:
    """Answer commands until the pipe is closed."""
    import jinja2
    import sklearn.datasets
    import tensorboard.summary.writer.event_file_writer
    import torch.utils.tensorboard

    from okdc import cli, methods
    from okdc.cli import tables
    from okdc.pipeline import compression
    from okdc.report import plots

    assert all((jinja2, sklearn.datasets, tensorboard, torch.utils.tensorboard, plots, tables, compression))
    for name in methods.names():
        methods.get(name)
    for line in sys.stdin:
        words, folder, given = json.loads(line)
        accident = Accident(**given) if given else None
        with open(Path(folder, "log.txt"), "w") as log:
            pid = os.fork()
            if not pid:
                os.setpgid(0, 0)
                os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
                os.chdir(folder)
                _prepare(accident, Path(folder).resolve() / "runs")
                sys.argv[1:] = words  # which okdc gives to the processes that it starts
                cli.main(words, prog_name="okdc")
        print(json.dumps(_watch(pid, Path(folder, "log.txt"), accident)), flush=True)


def _watch(pid: int, log: Path, accident: Accident | None) -> int | None:
    """Wait for the process, and let the accidents happen that come from outside."""
    awaited = accident.at if accident and accident.what in OUTSIDE else None
    start = time.monotonic()
    while time.monotonic() < start + TIMEOUT:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if accident and awaited and log.read_text().count(" step ") >= awaited:
            time.sleep(accident.delay)
            _strike(pid, accident.what)
            awaited = None
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _strike(pid: int, what: str) -> None:
    if what == "step":
        os.kill(pid, signal.SIGKILL)
    elif what.startswith(("worker", "rank")):
        child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1 if what.startswith("rank") else 0]
        os.kill(int(child), signal.SIGKILL if what.endswith("killed") else signal.SIGSTOP)
    else:
        os.killpg(pid, signal.Signals[what])


def _prepare(accident: Accident | None, runs: Path) -> None:
    if accident and accident.what == "torn":
        _tear(accident)
    elif accident:
        sys.addaudithook(_FileHook(accident, str(runs)))


def _tear(accident: Accident) -> None:
    sync, count = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += stat.S_ISREG(os.fstat(descriptor).st_mode)
        if count == accident.at:
            os.truncate(descriptor, int(accident.part * os.fstat(descriptor).st_size))
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync


class _FileHook:
    """Counts what is about to be done to the files of a run."""

    def __init__(self, accident: Accident, runs: str) -> None:
        self.accident, self.runs, self.count = accident, runs, 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._changes_a_file(event, args):
            return
        self.count += 1
        if self.count < self.accident.at:
            return
        if self.accident.what in ("file", "export"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.accident.what == "full":
            # Less than a checkpoint, and more than what the run says, which goes to a file, too.
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.RLIM_INFINITY))
        if self.accident.what == "read-only":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))

    def _changes_a_file(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            return bool(args[2] & WRITES) and self._ours(args[0])
        return event in ("os.rename", "os.link", "os.remove") and self._ours(args[0])

    def _ours(self, path: Any) -> bool:
        there = isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.runs)
        return there and (self.accident.what != "export" or "/.export." in os.fspath(path))


if __name__ == "__main__":
    serve()
