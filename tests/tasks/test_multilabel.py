"""Several labels for an image: the maths beside naive formulas, tables of all kinds, and a run from end to end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from okdc import losses, tasks
from okdc.cli import main
from okdc.data import open_source, wrap
from okdc.errors import DataError
from okdc.pipeline import export, verify
from okdc.recipe import DataSettings
from okdc.tasks.multilabel import Multilabel
from okdc.tasks.shared.label_scores import LabelScorer, average_precisions, thresholds

NAMES = ("bar", "disc", "square")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_losses_are_the_naive_formulas() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(4, 3), torch.randn(4, 3), (torch.rand(4, 3) < 0.5).float()
    weights = torch.tensor([1.0, 2.0, 0.5])
    ce = kl = soft = 0.0
    for i in range(4):
        for c in range(3):
            z, t, y = student[i, c].item(), teacher[i, c].item(), labels[i, c].item()
            ce -= weights[c].item() * y * math.log(sigmoid(z)) + (1 - y) * math.log(1 - sigmoid(z))
            p, q = sigmoid(t / 2), sigmoid(z / 2)
            kl += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            soft -= p * math.log(q) + (1 - p) * math.log(1 - q)
    with losses.weighted(weights):
        assert losses.binary_cross_entropy(student, labels).item() == pytest.approx(ce / 12, rel=1e-5)
    assert losses.binary_kl(student, teacher, 2.0).item() == pytest.approx(4 * kl / 12, rel=1e-4)
    assert losses.soft_binary_cross_entropy(student, teacher, 2.0).item() == pytest.approx(soft / 12, rel=1e-5)
    assert losses.binary_kl(teacher, teacher, eps=0.0).item() == pytest.approx(0, abs=1e-7)
    teacher.requires_grad_(), student.requires_grad_()
    losses.binary_kl(student, teacher).backward()
    assert teacher.grad is None and student.grad is not None
    losses.binary_kl(student, teacher, detach=False).backward()
    assert teacher.grad is not None


def precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """The mean, over the images that have the label, of the share of those ranked so high that have it too."""
    return float(np.mean([truth[scores >= scores[i]].mean() for i in np.flatnonzero(truth)]))


def test_average_precision_is_the_naive_one_and_adds_up_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    out, other, labels = torch.randn(30, 4), torch.randn(30, 4), (torch.rand(30, 4) < 0.4).float()
    labels[:, 3] = 0  # a label that no image has counts for nothing
    expected = [100 * precision(out[:, c].numpy(), labels[:, c].numpy()) for c in range(3)]
    found = average_precisions(out.numpy(), labels.numpy())
    assert found[:3].tolist() == pytest.approx(expected) and np.isnan(found[3])
    whole = LabelScorer(4, 1)
    whole.update(out, labels, (other,))
    assert whole.value()["map"] == pytest.approx(np.mean(expected))
    assert whole.counts()[:, 0].tolist() == labels.sum(0).tolist()

    parts = [LabelScorer(4, 1), LabelScorer(4, 1), LabelScorer(4, 1)]  # the second has no images
    for part, rows in ((parts[0], slice(0, 12)), (parts[2], slice(12, 30))):
        part.update(out[rows], labels[rows], (other[rows],))
    here, meeting, said = threading.local(), threading.Barrier(3), [torch.zeros(0)] * 3
    monkeypatch.setattr("okdc.tasks.shared.label_scores.world", lambda: 3)
    monkeypatch.setattr("okdc.tasks.shared.label_scores.rank", lambda: here.rank)

    def add(vector: Tensor) -> Tensor:
        said[here.rank] = vector
        meeting.wait(10)
        total = torch.stack(said).sum(0)
        meeting.wait(10)
        return total

    def process(rank: int) -> None:
        here.rank = rank
        parts[rank].add_up(add)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(process, range(3)))
    for part in parts:
        assert part.value() == pytest.approx(whole.value()) and part.others() == pytest.approx(whole.others())
        assert part.images == 30


def test_thresholds_have_the_best_f1() -> None:
    generator = np.random.default_rng(0)
    odds, labels = 0.05 + 0.9 * generator.random((40, 3)).round(1), generator.random((40, 3)) < (0.3, 0.6, 0.0)

    def f1(threshold: float, c: int) -> float:
        named = odds[:, c] > threshold
        return 2 * (named & labels[:, c]).sum() / (named.sum() + labels[:, c].sum())

    for c, threshold in enumerate(thresholds(odds, labels)[:2]):
        assert f1(threshold, c) == max(f1(each, c) for each in np.linspace(0, 1, 101))
    assert thresholds(odds, labels)[2] == 0.5  # nothing says where


def test_files_agree_where_the_same_labels_are_there() -> None:
    task = Multilabel({"thresholds": [0.5, 0.9]})
    limit = math.log(9)
    reference = np.array([[1.0, 1.0], [1.0, 3.0], [1e-6, -1.0], [-2.0, limit + 1e-6]])
    out = np.array([[2.0, 2.0], [1.0, 2.0], [-1e-6, -1.0], [2.0, limit - 1e-6]])
    assert task.tally().same(out, reference).tolist() == [True, False, False, False]
    tally = task.tally()
    tally.agreement(out, reference, 1e-4)
    assert (tally.compared, tally.agree, tally.ties) == (4, 1, 1)  # the last differs in a label that is no tie too


def test_weights_are_how_often_a_label_is_not_there() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert tasks.get("multilabel").weights(rows, 3).tolist() == [pytest.approx(1 / 3), 3.0, 1.0]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.tensor([0, 1]), "Where an image has one class: --task classify"),
        (torch.tensor([[0.5, 1.0], [0.0, 1.0]]), "1 of the training labels are neither 0 nor 1, such as 0.5"),
        (torch.zeros(3, 2), "for 2 images; expected for each image and label 1 or 0"),
    ],
)
def test_labels_of_a_loader_are_checked(labels: Tensor, told: str) -> None:
    with pytest.raises(DataError, match=told):
        wrap([(torch.randn(2, 3, 8, 8), labels)], task=tasks.get("multilabel"))
    with pytest.raises(DataError, match="not several or none"):
        wrap([(torch.randn(2, 3, 8, 8), torch.tensor([[1.0, 1.0], [0.0, 1.0]]))])


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose red, green and blue say which of three labels are there, and files that say it too."""
    root, generator = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    there = (generator.random((60, 3)) < (0.3, 0.5, 0.5)).astype(int)
    there[:3] = np.eye(3, dtype=int)
    there[3] = 0
    for i, row in enumerate(there):
        pixels = generator.integers(0, 80, (16, 16, 3)) + 150 * row
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i}.png")
    sets = [[name for name, mark in zip(NAMES, row) if mark] for row in there]
    marks = [",".join(map(str, row)) for row in there]
    _write(root / "columns.csv", "path," + ",".join(NAMES), [f"{i}.png,{row}" for i, row in enumerate(marks)])
    _write(root / "list.csv", "path,labels", [f"{i}.png,{'|'.join(each)}" for i, each in enumerate(sets)])
    _write(root / "python.tsv", "path\tlabels", [f"{i}.png\t{each}" for i, each in enumerate(sets)])
    lines = [json.dumps({"path": f"{i}.png", "labels": each}) for i, each in enumerate(sets)]
    (root / "lines.jsonl").write_text("\n".join(lines))
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(60)],
        "categories": [{"id": 7 + c, "name": name} for c, name in enumerate(NAMES)],
        "annotations": [{"image_id": i, "category_id": 7 + c} for i in range(60) for c in range(3) if there[i, c]],
    }
    (root / "coco.json").write_text(json.dumps(coco))
    return root


def _write(file: Path, header: str, rows: list[str]) -> None:
    file.write_text("\n".join([header, *rows]), encoding="utf-8")


def opened(given: Path | str, task: str = "multilabel", **more: Any) -> Any:
    return open_source(DataSettings(data=str(given), workers=0, **more), 0, tasks.get(task))


@pytest.mark.parametrize("name", ["list.csv", "python.tsv", "lines.jsonl", "coco.json"])
def test_all_files_say_the_same(folder: Path, name: str) -> None:
    expected, found = opened(folder / "columns.csv"), opened(folder / name)
    assert found.classes == expected.classes == NAMES
    for split in ("train", "validation"):
        one, other = getattr(expected, split), getattr(found, split)
        assert [one.name(i) for i in range(len(one))] == [other.name(i) for i in range(len(other))]
        assert torch.equal(one.labels, other.labels) and one.labels.shape[1] == 3
    assert 0 in expected.train.labels.sum(1)  # an image without any label is an image


def test_spaces_separate_where_nothing_else_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    _write(tmp_path / "a.csv", "path,tags", [f"{i}.png,{'haze primary' if i % 2 else 'clear'}" for i in range(20)])
    assert opened(tmp_path / "a.csv").classes == ("clear", "haze", "primary")
    assert "separated by spaces" in caplog.text


def test_one_class_and_several_labels_are_sent_to_each_other(folder: Path) -> None:
    with pytest.raises(DataError, match="--task multilabel where they may have several"):
        opened(folder / "columns.csv", "classify")
    with pytest.raises(DataError, match="or train with --task multilabel"):
        opened(folder / "coco.json", "classify")
    with pytest.raises(DataError, match="gives each image one class; --task multilabel expects a table"):
        opened("digits")


# --- a run ------------------------------------------------------------------------------------------------------------

RUN = (
    "--task", "multilabel", "--model", "test_resnet", "--img-size", "16", "--method", "one", "-b", "16", "-j", "0",
    "--epochs", "2", "--lr", "0.05", "--no-aug", "--pos-weight", "auto", "--batch-sizes", "1", "--device", "cpu",
    "--sched", "none",
)  # fmt: skip


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    given = ["--data", str(folder / "columns.csv"), "--output", str(output), "--experiment", "a"]
    main(["compress", *RUN, *given, "--min-agreement", "0"], standalone_mode=False)
    return output / "a"


def test_a_run_ships_thresholds_and_predicts_with_them(ran: Path, folder: Path) -> None:
    config = json.loads((ran / "export" / "config.json").read_text())["okdc"]
    assert config["task"] == "multilabel" and len(config["thresholds"]) == 3
    verification = json.loads((ran / "export" / "verification.json").read_text())
    rows = {row["name"]: row for row in verification["rows"]}
    assert verification["task"] == "multilabel" and "top1" not in rows["onnx"]
    assert rows["onnx"]["map"] == pytest.approx(rows["torch"]["map"]) and rows["onnx"]["agreement"] == 100
    report = json.loads((ran / "report.json").read_text())
    assert report["metrics"]["map"] == rows["torch"]["map"] and {row["name"] for row in report["labels"]} == {*NAMES}
    assert "mAP" in (ran / "report.html").read_text(encoding="utf-8")
    assert "| label | images with it |" in (ran / "report.md").read_text(encoding="utf-8")
    images = [str(folder / "0.png"), str(folder / "5.png")]
    predict = [sys.executable, str(ran / "export" / "predict.py"), *images, "--json"]
    lines = subprocess.run(predict, capture_output=True, text=True, check=True).stdout.splitlines()
    for line in lines:
        for each in json.loads(line)["predictions"]:
            assert each["probability"] > config["thresholds"][each["index"]] and each["label"] == NAMES[each["index"]]


def test_the_bundle_is_verified_again_and_exported_again(ran: Path, folder: Path) -> None:
    before = json.loads((ran / "export" / "config.json").read_text())["okdc"]["thresholds"]
    assert verify(ran / "export", data=str(folder / "list.csv"), batch_sizes=[])["verdict"] == "pass"
    verification = export(ran, output=ran / "again", batch_sizes=[], min_agreement=0.0)
    assert verification["verdict"] == "pass"
    assert json.loads((ran / "again" / "config.json").read_text())["okdc"]["thresholds"] == before


def test_a_run_that_goes_on_ends_with_the_same_weights_and_thresholds(ran: Path, folder: Path) -> None:
    given = ["--data", str(folder / "columns.csv"), "--output", str(ran.parent), "--no-onnx", "--experiment", "b"]
    main(["compress", *RUN, *given, "--epochs", "1"], standalone_mode=False)
    main(["compress", "--resume", str(ran.parent / "b"), "--epochs", "2"], standalone_mode=False)
    one, two = (torch.load(ran.parent / name / "last.pth.tar", weights_only=True) for name in "ab")
    for name, value in one["okdc"]["method"].items():
        assert torch.equal(value, two["okdc"]["method"][name]), name
    student = [json.loads((ran.parent / name / "student.json").read_text()) for name in "ab"]
    assert [len(each.pop("typed")) for each in student] == [1, 2]  # commands
    assert student[0] == student[1] and len(student[0]["thresholds"]) == 3
