"""A bundle goes to the hub as it is, by timm's function and after a check; a small server stands in for the hub."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
from click.testing import CliRunner, Result

from okdc import deploy
from okdc.cli import main
from okdc.deploy.hub import push
from okdc.recipe import ExportSettings


class Hub(ThreadingHTTPServer):
    """The six answers of the Hugging Face hub that an upload asks for; keeps what each commit holds."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.commits: list[dict[str, bytes]] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def do_GET(self) -> None:
        known = self.headers["Authorization"] == "Bearer hf_right"
        self._say(
            {"name": "me", "type": "user", "orgs": []} if known else {"error": "Invalid username or password."},
            200 if known else 401,
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self._say({"url": f"{self.server.address}/me/net", "name": "me/net"})
        elif self.path.endswith("/validate-yaml"):
            self._say({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._say({"files": files})
        elif "/commit/" in self.path:
            entries = [json.loads(line) for line in body.splitlines()]
            files = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}
            self.server.commits.append(files)
            self._say({"commitUrl": f"{self.server.address}/me/net/commit/1", "commitOid": "1", "success": True})
        else:
            self._say({}, 404)

    def _say(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny network: what is exported again, and pushed."""
    folder = tmp_path_factory.mktemp("saved") / "bundle"
    settings, classes = ExportSettings(onnx=False, batch_sizes=[]), ("a", "b", "c", "d")
    preprocess = timm.data.resolve_data_config({"input_size": (3, 32, 32)})
    network = timm.create_model("test_resnet", num_classes=4)
    deploy.export_bundle(network, None, settings, folder, arch="test_resnet", preprocess=preprocess, classes=classes)
    return folder


@pytest.fixture
def export(hub: Hub, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Result]:
    """`okdc export --push-to-hub` with a token."""
    template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))

    def run(repository: str, token: str) -> Result:
        monkeypatch.setenv("HF_TOKEN", token)
        words = ["export", str(saved), "--no-onnx", "--batch-sizes", ",", "--output", str(tmp_path / "export")]
        return CliRunner().invoke(main, [*words, "--push-to-hub", repository])

    return run


def test_the_whole_bundle_is_pushed_and_timm_pushes_the_network(
    hub: Hub, export: Callable[[str, str], Result], tmp_path: Path
) -> None:
    done = export("me/net", "hf_right")
    assert done.exit_code == 0, done.output
    assert f"Pushed to {hub.address}/me/net" in done.stderr
    bundle = tmp_path / "export"
    network, whole = hub.commits
    assert set(network) == {"config.json", "model.safetensors", "README.md"}
    assert whole == {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*")}
    (bundle / "__pycache__").mkdir()
    (bundle / "__pycache__" / "predict.pyc").write_bytes(b"of this machine")
    push(bundle, "me/net")
    assert hub.commits[-1] == whole


@pytest.mark.parametrize(
    ("repository", "token", "said"),
    [
        ("me/net", "", "nobody is logged in here. Type: hf auth login"),
        ("me/net", "hf_wrong", "or log in again (hf auth login)"),
        ("me/net/more", "hf_right", "give USER/NAME"),
    ],
    ids=["nobody", "wrong token", "name"],
)
def test_it_is_refused_before_any_work(
    export: Callable[[str, str], Result], tmp_path: Path, repository: str, token: str, said: str
) -> None:
    done = export(repository, token)
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "export").exists()


def test_offline_is_said(export: Callable[[str, str], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # the one that is open was made to go online
    done = export("me/net", "hf_right")
    assert done.exit_code == 2 and "the hub cannot be used from here" in " ".join(done.stderr.split())
    assert not (tmp_path / "export").exists()
