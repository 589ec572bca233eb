"""Which classes are taken for which: counted once, in the validation of the epoch that ships, and shown in words."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import okdc
from okdc.tasks.shared import confusion
from okdc.training import checkpoint
from tests.helpers.training import SETTINGS, Tiny, run, tiny_data
from tests.report.test_report import pages, sample, without_spaces

COUNTS = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 2]])


def test_recall_and_balanced_accuracy_of_classes_that_have_images() -> None:
    assert confusion.recalls(COUNTS).nan_to_num(-1).tolist() == [75, -1, 50]
    assert confusion.balanced(COUNTS) == 62.5
    assert confusion.balanced(torch.tensor([[1, 3], [2, 2], [0, 0]])) == 62.5  # wrong and right, of many classes


@pytest.mark.parametrize("classes", [3, confusion.MOST + 1])
def test_cells_are_those_of_the_counts(classes: int) -> None:
    named, labels = torch.tensor([0, 2, 1, 1]), torch.tensor([0, 0, 1, 2])
    cells = confusion.cells(named, labels, classes)
    counts = torch.bincount(cells, minlength=classes * confusion.columns(classes)).view(classes, -1)
    assert confusion.recalls(counts)[:3].tolist() == [50, 100, 0]
    assert counts.shape[1] == (3 if classes == 3 else 2)


def test_what_is_said_of_the_classes() -> None:
    told = confusion.summary(COUNTS, ["ant", "bee", "cow"])
    assert told["classes"][1] == {"name": "bee", "images": 0, "recall": None}
    assert told["pairs"] == [
        {"true": "cow", "named": "ant", "images": 2, "share": 50.0},
        {"true": "ant", "named": "bee", "images": 1, "share": 25.0},
    ]
    assert told["table"] == COUNTS.tolist() and told["always"] is None
    assert confusion.summary(torch.tensor([[9, 0], [4, 0]]), ["big", "small"])["always"] == "big"
    many = confusion.summary(torch.eye(30, dtype=torch.int), [str(i) for i in range(30)])
    assert many["table"] is None and many["pairs"] == []
    most = confusion.summary(torch.ones(1001, 2, dtype=torch.int), [str(i) for i in range(1001)])
    assert most["pairs"] is None and most["classes"][1000]["recall"] == 50


def test_the_counts_are_those_of_the_epoch_that_ships(tmp_path: Path) -> None:
    state = run(tmp_path)
    best = checkpoint.load(tmp_path / "model_best.pth.tar")
    method = Tiny()
    method.cohort.target.load_state_dict(best["state_dict"])
    images, labels = (torch.cat(parts) for parts in zip(*tiny_data().validation))
    with torch.no_grad():
        named = method.eval().cohort(images).logits[0].argmax(1)
    expected = torch.zeros(3, 3, dtype=torch.int32)
    for true, guess in zip(labels, named):
        expected[true, guess] += 1
    kept = checkpoint.load(tmp_path / "last.pth.tar")["okdc"]["run"]["confusion"]
    assert torch.equal(state.confusion, expected) and torch.equal(kept, expected)
    row = state.history[state.best_epoch]
    assert row["eval_balanced"] == pytest.approx((100 * expected.diag() / expected.sum(1)).mean().item())


def uneven() -> list[tuple[Tensor, Tensor]]:
    """Fifty images of a class to one of another, which look alike: naming the large class is right for 98 %."""
    labels = torch.zeros(102, dtype=torch.int64)
    labels[[50, 101]] = 1
    images = torch.randn(102, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return [(images[:51], labels[:51]), (images[51:], labels[51:])]


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def test_a_student_that_always_names_the_large_class_is_told_so(tmp_path: Path) -> None:
    loader = uneven()
    settings = {"method": "baseline", "epochs": 2, "lr": 0.1, "onnx": False, "device": "cpu", "experiment": "run"}
    torch.manual_seed(0)
    result = okdc.compress(plain(), loader, loader, output=tmp_path, **settings)
    assert result.metrics["top1"] == pytest.approx(100 * 100 / 102) and result.metrics["balanced"] == 50
    report = json.loads((result.path / "report.json").read_text())
    assert report["confusion"]["always"] == "0" and report["confusion"]["table"] == [[100, 0], [2, 0]]
    said = without_spaces((result.path / "report.md").read_text(encoding="utf-8"))
    assert "| balanced accuracy | 50.0 %" in said and "The student names 0 for every image." in said
    assert "| 1 | 2 | 0.0 % | 0 |" in said
    with open(result.path / "summary.csv", newline="") as file:
        assert [row["eval_balanced"] for row in csv.DictReader(file)] == ["50.0", "50.0"]


def test_the_page_shows_the_table_and_names_the_worst(tmp_path: Path) -> None:
    told = confusion.summary(COUNTS, ["ant<", "bee", "cow"])
    page, markdown = pages(tmp_path, sample(confusion=told))
    text = without_spaces(page.text)
    assert "Worst: cow, 50.0 % of 4 images, most often taken for ant<; ant<, 75.0 % of 4 images" in text
    assert "Without validation images: bee." in text and "label ↓ answer →" in text, "the corner of the table"
    inks = [attrs["style"] for tag, attrs in page.tags if tag == "i" and "opacity" in (attrs.get("style") or "")]
    assert inks == [f"opacity:{ink}" for ink in (0.75, 0.25, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.5)]
    assert "| cow | ant\\< | 2 | 50.0 % |" in without_spaces(markdown)


def test_of_many_classes_the_worst_pairs_are_shown(tmp_path: Path) -> None:
    counts = torch.eye(30, dtype=torch.int) * 5
    counts[3, 7] = 4
    page, markdown = pages(tmp_path, sample(confusion=confusion.summary(counts, [f"c{i}" for i in range(30)])))
    assert "c3c7444.4 %" in page.text.replace("\n", "").replace(" ", "").replace("\u00a0", " ")
    assert "The worst 20 of 30 classes" in markdown


# --- what picks the epoch that ships ----------------------------------------------------------------------------------


class Scripted(Tiny):
    """A target whose answers are given for each epoch: what is right by one measure is not by another."""

    answers: tuple[Tensor, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.cohort.target.register_forward_hook(self._answer)

    def _answer(self, module: nn.Module, images: object, logits: Tensor) -> Tensor:
        if self.training or len(logits) != len(self.answers[0]):
            return logits
        return nn.functional.one_hot(self.answers[int(self.epoch)], 3).float() + 0 * logits


LABELS = torch.tensor([0] * 6 + [1] + [2])
ANSWERS = (
    torch.tensor([0] * 8),  # 6 of 8 right, balanced 1/3
    torch.tensor([0] * 3 + [1] * 3 + [1, 2]),  # 5 of 8 right, balanced 5/6
    torch.tensor([0] * 6 + [0, 0]),
)


def scripted(folder: Path, metric: str, epochs: int = 3, **options: object):
    method = Scripted()
    method.answers = ANSWERS
    data = SimpleNamespace(
        **vars(tiny_data()) | {"validation": [(torch.randn(8, 3, 8, 8), LABELS)]},
    )
    settings = replace(SETTINGS, epochs=epochs, eval_metric=metric)
    return run(folder, settings, method=method, data=data, recipe={"train": {"eval_metric": metric}}, **options)


@pytest.mark.parametrize(("metric", "epoch", "best"), [("top1", 0, 75), ("balanced", 1, 250 / 3), ("top5", 0, 100)])
def test_the_metric_picks_the_epoch(metric: str, epoch: int, best: float, tmp_path: Path) -> None:
    state = scripted(tmp_path, metric)
    assert state.best_epoch == epoch and state.best == pytest.approx(best)
    assert checkpoint.load(tmp_path / "model_best.pth.tar")["epoch"] == epoch
    assert checkpoint.load(tmp_path / "model_best.pth.tar")["metric"] == pytest.approx(best)
    assert state.confusion is not None and state.confusion.sum() == 8


def test_a_run_that_goes_on_by_another_metric_judges_what_it_kept_by_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(tmp_path, "top1", epochs=1)
    state = scripted(tmp_path, "balanced", epochs=2, resume=tmp_path / "last.pth.tar")
    assert "chosen by top1; from here on balanced chooses" in capsys.readouterr().err
    assert state.best_epoch == 1 and state.best == pytest.approx(250 / 3)
