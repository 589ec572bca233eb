"""model.pt2 gives torch's numbers at every batch size in eval mode, and an archive with pickles in it is not loaded."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from okdc.deploy import targets
from tests.helpers.exported import EXAMPLE, assert_same, tiny

to_torch = targets.find("torch").module


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    network, path = tiny(), tmp_path_factory.mktemp("torch") / to_torch.FILE
    return network, path, to_torch.write(network, EXAMPLE, path, metadata={"okdc.labels": "[]"})


def test_float32_is_computed_as_float32(exported, monkeypatch):
    run, seen = to_torch.runner(exported[1]), []
    monkeypatch.setattr(run, "_network", lambda images: seen.append(torch.backends.cudnn.allow_tf32) or images)
    before = torch.backends.cudnn.allow_tf32
    run(np.zeros((1, 3, 32, 32), dtype=np.float32))
    assert before and seen == [False] and torch.backends.cudnn.allow_tf32 is before


def rewritten(path: Path, place: Path, **files: bytes) -> Path:
    """A copy of the archive with some of its files replaced, or added."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(place, "w") as new:
        for name in old.namelist():
            new.writestr(name, files.pop(name.partition("/")[2], old.read(name)))
        for name, content in files.items():
            new.writestr(f"archive/{name}", content)
    return place


def test_equals_torch_at_every_batch(exported):
    network, path, facts = exported
    assert network.training  # left as it was
    run = to_torch.runner(path, threads=1)
    before = torch.get_num_threads()
    assert_same(run, network)
    assert torch.get_num_threads() == before and run.provider == "cpu"
    assert facts["bytes"] == path.stat().st_size and facts["dynamic_batch"]
    assert to_torch.available() is None


def test_file_is_clean_and_stamped(exported):
    with zipfile.ZipFile(exported[1]) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
        assert json.loads(archive.read("archive/extra/metadata.json")) == {"okdc.labels": "[]"}
    here = [Path.cwd(), Path.home(), Path(torch.__file__).parents[1], "site-packages"]
    assert not [place for place in here if str(place).encode() in content]
    assert list(exported[1].parent.iterdir()) == [exported[1]]


def test_constants_of_the_network_are_loaded(tmp_path):
    network = tiny("test_vit", img_size=32)
    to_torch.write(network, EXAMPLE, tmp_path / "vit.pt2")
    assert_same(to_torch.runner(tmp_path / "vit.pt2", threads=1), network)


class Evil:
    def __reduce__(self):
        return os.mkdir, (self.place,)

    def __init__(self, place: Path) -> None:
        self.place = str(place)


@pytest.mark.parametrize(
    "name", ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/opaque_obj_0"]
)
def test_archive_that_runs_code_is_refused(exported, tmp_path, name):
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "ran"), buffer, pickle_module=pickle)
    with pytest.raises(RuntimeError, match="not loaded"):
        to_torch.runner(rewritten(exported[1], tmp_path / "evil.pt2", **{name: buffer.getvalue()}))
    assert not (tmp_path / "ran").exists()


def test_pickled_weight_is_refused(exported, tmp_path):
    name = "data/weights/model_weights_config.json"
    with zipfile.ZipFile(exported[1]) as archive:
        config = json.loads(archive.read(f"archive/{name}"))
    next(iter(config["config"].values()))["use_pickle"] = True
    with pytest.raises(RuntimeError, match="holds pickled conv1"):
        to_torch.runner(rewritten(exported[1], tmp_path / "evil.pt2", **{name: json.dumps(config).encode()}))


class Branching(nn.Module):
    def forward(self, images):
        return images if images.sum().item() > 0 else -images


def test_failure_keeps_the_good_file(tmp_path):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"good")
    with pytest.raises(RuntimeError, match="cannot capture this network"):
        to_torch.write(Branching(), EXAMPLE, path)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(exported):
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        to_torch.runner(exported[1], device="cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_on_cuda(exported):
    run = to_torch.runner(exported[1], device="cuda")
    assert run.provider == "cuda"
    assert_same(run, exported[0], limit=1e-4)  # no TF32
