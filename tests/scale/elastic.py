"""torchrun's elastic restart, with gloo on this machine: a process is killed, a node is lost and another one joins.

    python tests/scale/elastic.py [killed] [nodes] [namespaces] [exporting]

killed: one of two processes is killed in the middle; the run ends with the weights of one that nothing happened to.
nodes: of two nodes of one process each one is killed; the other goes on alone, then with a third one that joins.
namespaces: the same, each node in a network namespace of its own on one bridge; for root, on Linux.
exporting: the first of two nodes exports for longer than torchrun's launchers wait for one another (300 s, here 4), and
the second is the one where they meet.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from okdc.training import checkpoint

RUN = "compress --model test_resnet --img-size 32 --method dml --data digits --no-onnx --device cpu -j 0 -b 32"
RUN += " --recovery-interval 5 --log-interval 1 --output . --experiment run --resume auto"


IMPATIENT = """
import sys
from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
made = LocalElasticAgent.__init__
made.__defaults__ = tuple(4 if each == 300 else each for each in made.__defaults__)
run.main(sys.argv[1:])
"""

EXPORT = """
import time
from contextlib import ExitStack
from pathlib import Path
from okdc.ranks import rank
from okdc.recipe import TrainSettings
from okdc.training import launch
with ExitStack() as held:
    with launch.joined(TrainSettings(device="cpu")):
        leads = rank() == 0
        launch.stay_until_closed(held)
    if leads:
        time.sleep(30)
        Path("exported").touch()
"""

NODES = {"first": "10.77.0.1", "second": "10.77.0.2", "third": "10.77.0.3"}  # in namespaces

started: list[subprocess.Popen[bytes]] = []


def agent(folder: Path, name: str, epochs: int, *flags: str, within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """torchrun with the flags of a node, to train; what it says is in the file `name`."""
    line = ["-m", "torch.distributed.run", *flags, "-m", "okdc", *RUN.split(), "--epochs", str(epochs)]
    return begin(folder, name, *line, within=within)


def begin(folder: Path, name: str, *line: str, within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a node that joins waits for an address that nobody tells it
    }  # fmt: skip
    with open(folder / name, "wb") as said:
        started.append(
            subprocess.Popen([*within, sys.executable, *line], cwd=folder, env=environment, stdout=said, stderr=said)
        )
    return started[-1]


def one_node(folder: Path, restarts: int) -> subprocess.Popen[bytes]:
    return agent(folder, "said", 2, "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}")


def until(true: Callable[[], object], process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Wait for what comes true while the process lives."""
    start = time.monotonic()
    while not true():
        if process.poll() is not None or time.monotonic() > start + seconds:
            raise RuntimeError(f"it did not come, exit code {process.poll()}")
        time.sleep(0.02)


def said(folder: Path, name: str = "said") -> str:
    return (folder / name).read_text(errors="replace")


def workers(process: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(each) for each in children]


def killed(root: Path) -> None:
    """A worker is killed in the second epoch."""
    for name in ("whole", "killed"):
        folder = root / name
        folder.mkdir()
        process = one_node(folder, 1)
        if name == "killed":
            until(lambda: "epoch 2/2 step 7/" in said(root / "killed"), process)
            os.kill(workers(process)[-1], signal.SIGKILL)
        process.wait(600)
    print(*re.findall(r".*(?:Continuing|lost the others).*", said(root / "killed")), sep="\n")
    one, other = (checkpoint.load(root / name / "run" / checkpoint.LAST) for name in ("whole", "killed"))
    same = all(torch.equal(value, other["state_dict"][key]) for key, value in one["state_dict"].items())
    print(f"exit code {process.returncode}; the same weights as without: {same}")


def nodes(root: Path, apart: bool = False) -> None:
    """Two nodes, then the first alone, then the first and a third; apart: each in its network namespace."""
    meet = f"{NODES['first'] if apart else 'localhost'}:{free_port()}"
    flags = [
        "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=okdc",
        f"--rdzv-endpoint={meet}",
    ]  # fmt: skip

    def node(name: str) -> subprocess.Popen[bytes]:
        within = ["ip", "netns", "exec", f"okdc-{name}", "env", "GLOO_SOCKET_IFNAME=eth0"] if apart else []
        own = [f"--local-addr={NODES[name]}"] if apart else []
        hosts = f",is_host={int(name == 'first')}" if apart else ""  # torch does not know the address as its own
        return agent(root, name, 6, *flags, f"--rdzv-conf=last_call_timeout=5{hosts}", *own, within=within)

    first, second = node("first"), node("second")
    until(lambda: "epoch 2/6 step 3/" in said(root, "first") + said(root, "second"), first)
    for lost in (*workers(second), second.pid):
        os.kill(lost, signal.SIGKILL)
    second.wait()
    until(lambda: "epoch 3/6 step 3/" in said(root, "first"), first)
    third = node("third")
    codes = first.wait(600), third.wait(600)
    told = re.compile(r".*(?:Continuing|before|lost the others|Stopped|error:).*|epoch ./6: .{11}")
    for name in ("first", "second", "third"):
        print(*(f"{name}: {line}" for line in told.findall(said(root, name))), sep="\n")
    print(f"exit codes {codes}")
    if any(codes):
        print(*(said(root, name)[-3000:] for name in ("first", "third")), sep="\n\n")


def namespaces(root: Path) -> None:
    """As `nodes`, on a network of their own."""
    try:
        _ip("link add okdc type bridge", "link set okdc up")
        for name, address in NODES.items():
            end = f"okdc-{name}"[:15]
            _ip(f"netns add okdc-{name}", f"link add {end} type veth peer name eth0 netns okdc-{name}")
            _ip(f"link set {end} master okdc up", f"-n okdc-{name} addr add {address}/24 dev eth0")
            _ip(f"-n okdc-{name} link set eth0 up", f"-n okdc-{name} link set lo up")
        nodes(root, apart=True)
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", f"okdc-{name}"], check=False)
        subprocess.run(["ip", "link", "del", "okdc"], check=False)


def _ip(*lines: str) -> None:
    for line in lines:
        subprocess.run(["ip", *line.split()], check=True)


def exporting(root: Path) -> None:
    """The first node, which is not where they meet, works on alone."""
    (root / "impatient.py").write_text(IMPATIENT)
    (root / "export.py").write_text(EXPORT)
    port, made = free_port(), []
    for node, meets in (("first", 0), ("second", 1)):
        made.append(
            begin(
                root, node, "impatient.py", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=okdc",
                f"--rdzv-endpoint=localhost:{port}", f"--rdzv-conf=is_host={meets}", "export.py",
            )
        )  # fmt: skip
    codes = [process.wait(200) for process in made]
    print(f"exit codes {codes}; the export is there: {(root / 'exported').exists()}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


TRIALS = {"killed": killed, "nodes": nodes, "namespaces": namespaces, "exporting": exporting}

if __name__ == "__main__":
    for name in sys.argv[1:] or ("killed", "nodes", "exporting"):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            try:
                TRIALS[name](Path(folder))
            finally:
                for process in started:
                    process.terminate()  # torchrun ends its workers
                    process.wait(60)
