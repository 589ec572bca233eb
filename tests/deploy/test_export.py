"""A bundle is whole, portable, harmless and verified, and a bad one never takes the place of a good one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from safetensors.torch import load_file

from okdc import deploy, networks
from okdc.deploy import requirements, targets, writing
from okdc.deploy.bundle import load_student, read_golden, recover
from okdc.deploy.machine import environment
from okdc.errors import ExportError, GateError
from okdc.recipe import ExportSettings, NetworkSettings
from okdc.system import shipped
from okdc.verification import Exported, torch_runner
from tests.helpers.bundles import CLASSES, PREPROCESS, QUICK, WEIGHTS_ONLY, Images, export, perturb

FILES = {
    "model.onnx", "model.safetensors", "config.json", "preprocess.json", "labels.txt", "golden.npz", "predict.py",
    "requirements.txt", "verification.json", "README.md", "SHA256SUMS",
}  # fmt: skip


def test_the_bundle_is_whole(bundle: Path, student: torch.nn.Module) -> None:
    assert {path.name for path in bundle.iterdir()} == FILES
    assert deploy.check_sums(bundle) == []
    assert [path.name for path in bundle.parent.iterdir()] == ["export"]
    verification = json.loads((bundle / "verification.json").read_text())
    assert [row["name"] for row in verification["rows"]] == ["torch", "onnx", "predict.py"]
    assert all(row["pass"] and row["agreement"] == 100 for row in verification["rows"])
    assert verification["skipped"] == [] and verification["environment"]["torch"] == torch.__version__
    card = (bundle / "README.md").read_text()
    assert (
        all(f"`{name}`" in card for name in FILES - {"README.md"}) and "license: apache-2.0\n" in card.split("---")[1]
    )
    assert deploy.read(bundle)["classes"] == CLASSES
    assert set(load_file(bundle / "model.safetensors")) == set(student.state_dict())


def test_bare_timm_loads_it(bundle: Path, student: torch.nn.Module) -> None:
    network = timm.create_model(f"local-dir:{bundle}", pretrained=True)
    images = np.random.default_rng(2).standard_normal((2, 3, 32, 32), dtype=np.float32)
    assert np.array_equal(torch_runner(network)(images), torch_runner(student)(images))
    assert network.num_classes == 4 and tuple(network.pretrained_cfg["label_names"]) == CLASSES
    config = timm.data.resolve_data_config(model=network)
    assert json.dumps({key: config[key] for key in PREPROCESS}) == json.dumps(PREPROCESS)  # tuples are lists there


def test_predict_runs_from_the_bundle(bundle: Path, data: Images, student: torch.nn.Module, tmp_path: Path) -> None:
    image, _ = data.validation_images[3]
    image.save(tmp_path / "image.png")
    command = [sys.executable, "-W", "error", str(bundle / "predict.py"), str(tmp_path / "image.png"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = CLASSES[int(torch_runner(student)(data.validation[0][0].numpy())[3].argmax())]
    assert json.loads(done.stdout)["predictions"][0]["label"] == expected
    assert (bundle / "predict.py").read_bytes() == (shipped.folder("export") / "predict.py").read_bytes()


def test_no_file_names_a_place_on_this_machine(bundle: Path) -> None:
    places = {Path.cwd(), Path.home(), bundle.parent, Path(sys.prefix), Path(torch.__file__).parent, Path("/some")}
    for file in bundle.iterdir():
        content = file.read_bytes()
        found = [place for place in places if place != Path("/") and f"{place}/".encode() in content]
        assert not found, f"{file.name} holds {found}"


def test_exporting_again_replaces_the_bundle_with_the_same_bytes(
    copy: Path, student: torch.nn.Module, data: Images
) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    export(student, data, copy)
    same = {name for name, content in before.items() if (copy / name).read_bytes() == content}
    assert same >= FILES - {"verification.json", "README.md", "SHA256SUMS"}  # those hold times
    assert [path.name for path in copy.parent.iterdir()] == ["export"]


def test_what_python_leaves_behind_is_no_other_thing(student: torch.nn.Module, data: Images, copy: Path) -> None:
    subprocess.run([sys.executable, "-c", "import predict"], cwd=copy, env={"PYTHONDONTWRITEBYTECODE": ""}, check=True)
    assert list((copy / "__pycache__").iterdir()) and deploy.check_sums(copy) == []
    export(student, data, copy, WEIGHTS_ONLY)
    assert not (copy / "__pycache__").exists()


def test_a_folder_with_other_things_in_it_is_refused(student: torch.nn.Module, data: Images, copy: Path) -> None:
    (copy / "thesis.txt").write_text("ten years")
    with pytest.raises(ExportError, match=r"thesis.txt.*--output"):
        export(student, data, copy)
    assert (copy / "thesis.txt").read_text() == "ten years" and (copy / "model.onnx").exists()


def test_a_failed_gate_keeps_both_the_files_and_the_earlier_bundle(
    student: torch.nn.Module, data: Images, copy: Path
) -> None:
    sums = (copy / "SHA256SUMS").read_bytes()
    shifted = replace(data, validation=[(images, (labels + 1) % 4) for images, labels in data.validation])
    shifted = replace(shifted, validation_images=None)
    with pytest.raises(deploy.UnfitError, match=r"torch: its top-1 is .*export-failed") as caught:
        export(student, shifted, copy, WEIGHTS_ONLY, info={"metrics": {"top1": 100.0}})
    assert caught.value.exit_code == 3 and caught.value.verification["verdict"] == "fail"
    assert (copy / "SHA256SUMS").read_bytes() == sums and deploy.check_sums(copy) == []
    failed = deploy.failed_folder(copy)
    assert deploy.check_sums(failed) == []
    assert json.loads((failed / "verification.json").read_text())["verdict"] == "fail"
    assert set(load_file(failed / "model.safetensors")) == set(student.state_dict())
    assert "**fail**" in (failed / "README.md").read_text()


def test_a_target_that_cannot_be_written_fails_and_the_rest_is_kept(
    student: torch.nn.Module, data: Images, tmp_path: Path
) -> None:
    with pytest.raises(GateError, match="onnx: it could not be written: opset 99"):
        export(student, data, tmp_path / "export", ExportSettings(opset=99, batch_sizes=[]))
    assert not (tmp_path / "export").exists()
    assert (tmp_path / "export-failed" / "model.safetensors").is_file()


def test_all_that_an_exporter_said_is_kept_and_its_colours_are_not(
    student: torch.nn.Module, data: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"\x1b[96mno way\x1b[0m to say {tmp_path}/net.py\nstep 1 of 3\nNext steps: none")

    monkeypatch.setattr(targets.find("onnx").module, "write", write)
    with pytest.raises(GateError, match=r"onnx: it could not be written: no way to say net\.py \(all of it: export-e"):
        export(student, data, tmp_path / "export", QUICK)
    said = (tmp_path / "export-failed" / "export-errors.txt").read_text()
    assert said == "model.onnx\n\nno way to say net.py\nstep 1 of 3\nNext steps: none\n\n"
    assert "export-errors.txt" in (tmp_path / "export-failed" / "README.md").read_text()


def test_the_oldest_onnxruntime_that_takes_every_file_is_named(tmp_path: Path) -> None:
    def file(name: str, opset: int, form: int) -> Path:
        versions = [onnx.helper.make_opsetid("", opset)]
        model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), opset_imports=versions, ir_version=form)
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    def needed(*files: Path) -> str:
        return requirements.text(files).splitlines()[-1]

    plain, newer = file("a.onnx", 18, 8), file("b.onnx", 20, 9)
    assert needed(plain) == "onnxruntime>=1.14" and needed(plain, newer) == "onnxruntime>=1.17"
    assert needed(file("c.onnx", 18, 10)) == "onnxruntime>=1.18"  # what was written before, whatever the opset
    assert needed(file("d.onnx", 13, 7)) == "onnxruntime>=1.7"


def test_a_crash_leaves_the_earlier_bundle_and_no_litter(student: torch.nn.Module, data: Images, copy: Path) -> None:
    class Broken:
        def __iter__(self) -> Iterator[Any]:
            yield data.validation[0]
            raise OSError("the disk is gone")

    (copy.parent / ".export.123").mkdir()  # an export that was killed could not do so itself
    with pytest.raises(OSError, match="disk"):
        export(student, replace(data, validation=Broken()), copy, WEIGHTS_ONLY)
    assert [path.name for path in copy.parent.iterdir()] == ["export"] and deploy.check_sums(copy) == []


def test_wrong_classes_or_sizes_are_told_before_anything_is_written(student: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there are 3 classes"):
        export(student, None, tmp_path / "export", preprocess=PREPROCESS, classes=("a", "b", "c"))
    with pytest.raises(ExportError, match="input_size"):
        export(student, None, tmp_path / "export", classes=CLASSES)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(targets.find("tensorrt").module.available() is None, reason="TensorRT is available on this machine")
def test_an_unavailable_target_is_skipped_and_the_rest_is_written(student: torch.nn.Module, tmp_path: Path) -> None:
    settings = ExportSettings(trt=True, batch_sizes=[])
    verification = export(student, None, tmp_path / "export", settings, preprocess=PREPROCESS, classes=CLASSES)
    skipped = {entry["target"]: entry["reason"] for entry in verification["skipped"]}
    assert skipped["tensorrt"] and "raw validation images" in skipped["predict.py"]
    assert verification["verdict"] == "parity_only"
    assert {path.name for path in (tmp_path / "export").iterdir()} == FILES | {
        "to_tensorrt.py",
        "tensorrt_build.py",
        "tensorrt_engine.py",
    }
    assert "random inputs" in (tmp_path / "export" / "README.md").read_text()


class Own(torch.nn.Module):
    """A user's own network, which timm knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Conv2d(3, 8, 3, stride=2)
        self.classifier = torch.nn.Linear(8, 4)
        self.classifier.weight = torch.nn.Parameter(self.classifier.weight.t().contiguous().t())  # not contiguous

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images).relu().mean((2, 3)))


def test_a_network_that_timm_does_not_know(data: Images, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own, folder = Own(), tmp_path / "export"
    settings = ExportSettings(torch=True, batch_sizes=[])
    verification = export(own, data, folder, settings, arch="my_package.networks:build")
    assert [row["name"] for row in verification["rows"]] == ["torch", "onnx", "torch.export", "predict.py"]
    assert verification["skipped"] == []
    own.load_state_dict(load_file(folder / "model.safetensors"))
    card = (folder / "README.md").read_text()
    assert "load_file" in card and "my_package.networks:build" in card and "local-dir" not in card
    assert load_student(folder) is None
    again = deploy.verify_bundle(folder, data, QUICK)
    assert again["verdict"] == "pass"
    assert [row["name"] for row in again["rows"]] == ["onnx", "torch.export", "predict.py"]
    perturb(folder)
    assert "logits differ" in deploy.verify_bundle(folder, data, QUICK)["rows"][0]["reason"]


def test_an_export_that_was_killed_between_two_renames_costs_no_bundle(tmp_path: Path) -> None:
    folder, moved = tmp_path / "export", tmp_path / ".export.old-1"
    moved.mkdir()
    (moved / "model.onnx").write_bytes(b"good")
    recover(folder)
    assert (folder / "model.onnx").read_bytes() == b"good" and not moved.exists()
    moved.mkdir()
    recover(folder)
    assert (folder / "model.onnx").read_bytes() == b"good" and not moved.exists()


@pytest.mark.parametrize("arch", ["torchvision/shufflenet_v2_x0_5", "torchvision/googlenet"])
def test_torchvision_rebuilds_its_own(arch: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings, folder = NetworkSettings(model=arch), tmp_path / "export"
    known = {"preprocess": PREPROCESS, "classes": CLASSES, "model_args": networks.arguments(settings)}
    network = networks.load(settings, 4).eval()
    export(network, None, folder, WEIGHTS_ONLY, arch=arch, **known)
    lines = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {}
    exec(lines.replace('"model.safetensors"', repr(str(folder / "model.safetensors"))), scope)
    inputs, logits = read_golden(folder)
    assert np.array_equal(torch_runner(scope["network"])(inputs), logits)
    rebuilt = load_student(folder)
    assert rebuilt is not None and np.array_equal(torch_runner(rebuilt)(inputs), logits)


def test_a_network_that_timm_cannot_rebuild_says_so(student: torch.nn.Module, tmp_path: Path) -> None:
    changed = timm.create_model("test_resnet", num_classes=4)
    changed.fc = torch.nn.Sequential(torch.nn.Linear(96, 8), torch.nn.Linear(8, 4))
    verification = export(changed, None, tmp_path / "export", WEIGHTS_ONLY, preprocess=PREPROCESS, classes=CLASSES)
    (skipped,) = verification["skipped"]
    assert skipped["target"] == "model.safetensors" and "timm cannot rebuild" in skipped["reason"]
    assert load_student(tmp_path / "export") is None


def test_a_bundle_cannot_name_code_to_be_run(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architecture": "os:getcwd"}))
    assert load_student(copy) is None


def test_export_targets_are_found_by_their_file_names() -> None:
    assert set(targets.known()) == {
        "onnx", "onnx_fp16", "onnx_full", "onnx_int8", "onnx_int8_finetuned", "onnx_int8_trt", "tensorrt",
        "tensorrt_fp16", "tensorrt_int8", "tensorrt_rtx", "tensorrt_rtx_fp16", "tensorrt_rtx_int8", "torch",
    }  # fmt: skip
    assert targets.find("onnx").module is targets.find("onnx").module
    with pytest.raises(ExportError, match="Did you mean onnx"):
        targets.find("onx")


def test_what_is_run_and_named_is_the_gpu_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", "the {}".format)
    written = {"onnx": Exported(tmp_path / "model.onnx", targets.find("onnx").module)}
    for device, gpu, asked in (("cuda:1", "cuda:1", ":1"), ("cuda", "cuda", ""), ("cpu", "cuda:0", "")):
        assert environment(device)["gpu"] == f"the {gpu}"
        rows = writing.further(written, device)
        assert [row.device for row in rows.values()] == [f"cuda{asked}", f"tensorrt{asked}"]
        assert rows["onnx on tensorrt"].tolerance == 5e-3
