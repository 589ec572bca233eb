"""A bundle that is verified again: what changed since is named, and nothing in it is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from okdc import deploy
from okdc.deploy.bundle import read_golden, write_sums
from okdc.errors import GateError
from okdc.verification import torch_runner
from tests.helpers.bundles import CLASSES, QUICK, WEIGHTS_ONLY, Images, export, perturb


def test_verifying_again_passes_and_changes_nothing(copy: Path, data: Images) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    again = deploy.verify_bundle(copy, data, QUICK)
    assert again["verdict"] == "pass" and [row["name"] for row in again["rows"]] == ["torch", "onnx", "predict.py"]
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert deploy.verify_bundle(copy, None, QUICK)["verdict"] == "parity_only"


def test_changed_and_missing_files_are_named(copy: Path, data: Images) -> None:
    (copy / "labels.txt").write_text("green\nred\nblue\ngrey\n")
    (copy / "preprocess.json").unlink()
    assert deploy.check_sums(copy) == ["preprocess.json missing", "labels.txt changed"]
    with pytest.raises(GateError, match=r"preprocess.json missing, labels.txt changed"):
        deploy.verify_bundle(copy, data, QUICK)
    (copy / "SHA256SUMS").unlink()
    assert deploy.check_sums(copy) == ["SHA256SUMS missing"]


def edit_preprocess(folder: Path, **changes: Any) -> None:
    path = folder / "preprocess.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    write_sums(folder)


def shift_labels(folder: Path) -> None:
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES[1:] + CLASSES[:1]))
    write_sums(folder)


def change_program(folder: Path) -> None:
    with open(folder / "predict.py", "a", encoding="utf-8") as file:
        file.write("# and more\n")
    write_sums(folder)


def truncate(folder: Path) -> None:
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])
    write_sums(folder)


@pytest.mark.parametrize(
    ("spoil", "row"),
    [
        (perturb, "onnx"),
        (truncate, "onnx"),
        (shift_labels, "labels.txt"),
        (lambda folder: edit_preprocess(folder, mean=[0.485, 0.456, 0.406]), "predict.py"),
        (lambda folder: edit_preprocess(folder, std=[0.3, 0.3, 0.3]), "predict.py"),
        (change_program, "predict.py"),
    ],
    ids=["perturbed weights", "truncated", "labels shifted by one", "wrong mean", "wrong std", "another program"],
)
def test_planted_faults_fail_their_row(copy: Path, data: Images, spoil: Any, row: str) -> None:
    spoil(copy)
    verification = deploy.verify_bundle(copy, data, QUICK)
    assert verification["verdict"] == "fail"
    assert row in {each["name"] for each in verification["rows"] if not each["pass"]}
    assert row in deploy.failures(verification)


def test_labels_of_the_data_shifted_by_one_fail(copy: Path, data: Images, student: torch.nn.Module) -> None:
    images = data.validation[0][0]
    best = torch.from_numpy(torch_runner(student)(images.numpy())).argmax(1)
    right = replace(data, validation=[(images, best)], validation_images=None, sizes=(0, 8))
    export(student, right, copy, WEIGHTS_ONLY)
    wrong = replace(right, validation=[(images, (best + 1) % 4)])
    assert deploy.verify_bundle(copy, right, QUICK)["rows"][0]["top1"] == 100
    assert "torch: its top-1 is 0.00%" in deploy.failures(deploy.verify_bundle(copy, wrong, QUICK))


def scored(data: Images, student: torch.nn.Module, right: int, name: str) -> Images:
    """The same 16 images under another name, `right` of them labelled as the student has it."""
    images = torch.cat([batch for batch, _ in data.validation])
    said = torch.from_numpy(torch_runner(student)(images.numpy())).argmax(1)
    labels = torch.where(torch.arange(16) < right, said, (said + 1) % 4)
    return replace(data, validation=[(images, labels)], validation_images=None, name=name)


def test_a_collapse_on_other_images_is_said_and_fails_only_on_the_same(
    copy: Path, data: Images, student: torch.nn.Module
) -> None:
    export(student, scored(data, student, 14, "mine"), copy, WEIGHTS_ONLY)
    verified = {n: deploy.verify_bundle(copy, scored(data, student, n, "other"), QUICK) for n in (2, 10, 14, 16)}
    assert {verification["verdict"] for verification in verified.values()} == {"pass"}
    assert {n for n, verification in verified.items() if verification["rows"][0]["reason"]} == {2}
    told = verified[2]["rows"][0]["reason"]
    assert "12.50% on these 16 images and was 87.50% on the 16 of the export, 75 points lower" in told
    assert "chance explains 53:" in told, "three standard deviations: 3 sqrt(0.5 x 0.5 x 2 / 16)"
    same = deploy.verify_bundle(copy, scored(data, student, 2, "mine"), QUICK)
    assert same["verdict"] == "fail" and "when last measured it was 87.50%" in deploy.failures(same)


def test_the_first_images_that_an_older_okdc_took_count_as_no_more_draws_than_classes(
    copy: Path, data: Images, student: torch.nn.Module
) -> None:
    export(student, scored(data, student, 8, "mine"), copy, WEIGHTS_ONLY)
    other = scored(data, student, 0, "other")
    assert "was 50.00%" in deploy.verify_bundle(copy, other, QUICK)["rows"][0]["reason"]
    sampled = deploy.verify_bundle(copy, other, replace(QUICK, images=14))
    assert "on these 14 images and was 50.00%" in sampled["rows"][0]["reason"], "a sample: fourteen draws"
    assert sampled["sample"]["told"].startswith("14 of 16 images, ")
    recorded = json.loads((copy / "verification.json").read_text())
    recorded["data"]["images"] = 40
    (copy / "verification.json").write_text(json.dumps(recorded))
    write_sums(copy)
    assert deploy.verify_bundle(copy, other, QUICK)["rows"][0]["reason"] is None


def test_no_code_of_a_bundle_is_run(copy: Path, data: Images, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copy / "predict.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    write_sums(copy)
    deploy.verify_bundle(copy, data, QUICK)
    assert not marker.exists()
    objects = np.empty(1, dtype=object)
    np.savez(copy / "golden.npz", inputs=objects, logits=objects)
    with pytest.raises(ValueError, match="allow_pickle"):
        read_golden(copy)
