"""Example predictions of a run: which images, what is said of them, and the picture of the curves."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import okdc
from okdc import report, tasks
from okdc.pipeline import examples
from okdc.report.examples import SIDE
from okdc.report.keypoints import drawn
from tests.report.test_report import control, pages, sample, without_spaces


class Sure(nn.Module):
    """Is the surer the brighter an image is, and always names the same class."""

    def __init__(self, named: int) -> None:
        super().__init__()
        self.scale = nn.Conv2d(1, 1, 1, bias=False)
        self.last = nn.Linear(1, 2, bias=False)
        nn.init.ones_(self.scale.weight)
        self.last.weight.data = torch.eye(2)[named][:, None]

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.scale(images).mean((2, 3)))


def brighter() -> list[tuple[Tensor, Tensor]]:
    """Forty images, each brighter than the one before, of the classes 1 and 0 in turns, in batches of ten."""
    levels = torch.linspace(0.1, 4, 40).view(4, 10, 1, 1, 1)
    return [(each.expand(10, 1, 8, 8) + torch.eye(8) / 100, torch.tensor([1, 0] * 5)) for each in levels]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The examples of a student that always says 1, beside a control that always says 0."""
    folder, loader = tmp_path_factory.mktemp("runs"), brighter()
    settings = {"method": "baseline", "epochs": 1, "lr": 1e-9, "onnx": False, "device": "cpu", "output": folder}
    result = okdc.compress(Sure(1), loader, loader, experiment="student", **settings)
    assert json.loads((result.path / "report.json").read_text())["examples"]["groups"].keys() == {"right", "wrong"}
    okdc.compress(Sure(0), loader, loader, experiment="control", **settings)
    told = examples.of(replace(result, recipe=replace(result.recipe, method={"name": "dml"})))
    assert told is not None
    return told


def test_each_group_has_its_surest_images_first(found: dict[str, Any]) -> None:
    odds = torch.cat([images.mean((1, 2, 3)) for images, _ in brighter()]).sigmoid() * 100  # of the class that is named
    ones, noughts = odds[0::2].flip(0)[:6], odds[1::2].flip(0)[:6]
    for name, label, expected in (("right", "1", ones[:2]), ("wrong", "0", noughts), ("gained", "1", ones)):
        rows = found["groups"][name]
        assert [row["truth"] for row in rows] == [[label]] * len(expected), "two of a class are right, or six"
        assert [row["said"][0][0] for row in rows] == ["1"] * len(expected)
        assert [row["said"][0][1] for row in rows] == pytest.approx(expected.tolist(), abs=0.01)
        assert [row["control"][0][0] for row in rows] == ["0"] * len(expected)
    assert found["groups"]["lost"] == found["groups"]["wrong"]


def test_pictures_are_small_and_of_what_the_network_saw(found: dict[str, Any]) -> None:
    assert found["normalised"]  # nobody said how
    shown = Image.open(io.BytesIO(base64.b64decode(found["groups"]["right"][0]["picture"])))
    assert shown.mode == "L" and shown.size == (160, 160) and shown.getextrema()[0] < 20 < 235 < shown.getextrema()[1]
    preprocess = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.5, 1.0)}
    image = report.unnormalised(torch.tensor([-1.0, 0.5, 1.0])[:, None, None].expand(3, 6, 400), preprocess)
    assert image.getpixel((0, 0)) == (0, 128, 255)
    assert Image.open(io.BytesIO(base64.b64decode(report.picture(image)))).size == (SIDE, 2)


def test_several_labels_are_right_together_and_told_by_their_loss() -> None:
    task = tasks.get("multilabel", {"thresholds": [0.5, 0.9]})
    outs, labels = torch.tensor([[3.0, 2.0], [9.0, 9.0], [-9.0, 9.0]]), torch.tensor([[1.0, 0], [1, 1], [1, 0]])
    right, weight = task.notable(outs, labels)  # type: ignore[misc]
    assert right.tolist() == [True, True, False] and weight[1] > weight[0] and weight[2] > 8
    assert task.said(outs[0], ["a", "b"]) == [("a", pytest.approx(95.26, abs=0.01))]
    assert task.truth(labels[0], ["a", "b"]) == ["a"] and task.said(-outs[1], ["a", "b"]) == []


def test_the_page_shows_them_with_words_for_those_who_do_not_see(tmp_path: Path, found: dict[str, Any]) -> None:
    page, _ = pages(tmp_path, sample(baseline=control(), examples=found))
    text, pictures = without_spaces(page.text), [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) == 20 and all(str(each["src"]).startswith("data:image/jpeg;base64,") for each in pictures)
    assert "Its label is 0; the student says 1 (" in without_spaces(str(pictures[2]["alt"]))
    for words in ("Most clearly wrong", "Right where the baseline is wrong", "Nobody said how your loader normalises"):
        assert words in text
    found = found | {"groups": found["groups"] | {"lost": []}}
    page, _ = pages(tmp_path, sample(examples=found))
    assert "The student is wrong on no image where the baseline is right." in without_spaces(page.text)


def test_the_curves_of_a_run_and_its_control_are_one_picture(tmp_path: Path) -> None:
    report.write(tmp_path, sample())
    with Image.open(tmp_path / "results.png") as alone:
        assert alone.size == (1200, 900)
        ours = {(59, 79, 216), (91, 98, 112)}
        assert ours <= {colour for _, colour in alone.convert("RGB").getcolors(1 << 16)}
        before = alone.convert("RGB").tobytes()
    report.write(tmp_path, sample(baseline=control()))
    with Image.open(tmp_path / "results.png") as both:
        assert both.convert("RGB").tobytes() != before


def test_key_points_are_drawn_where_they_are_and_where_they_should_be(tmp_path: Path) -> None:
    true = torch.tensor([[[9.5, 9.5, 1.0], [29.5, 19.5, 1], [5, 5, 0]]])
    predicted = true + torch.tensor([3.0, 4.0, 0.0])
    image = drawn(Image.new("L", (40, 32)), predicted[0].tolist(), true[0].tolist(), [[0, 1], [1, 2]])
    assert image.size == (320, 256)  # eight times
    assert image.getpixel((104, 112)) == (
        0xE6,
        0x44,
        0x3C,
    )  # the dot of the first: (12.5 + 0.5, 13.5 + 0.5) times eight
    assert image.getpixel((80 + 2 * 4 - 1, 80)) == (0xE6, 0x44, 0x3C)  # its ring
    assert image.getpixel((184, 152)) == (255, 255, 255)  # half way of the skeleton's line
    assert image.getpixel((64, 76)) == (0, 0, 0)  # what has no label is not shown
    preprocess = {"mean": (0.0,), "std": (1.0,)}
    rows = report.pictured(torch.zeros(1, 1, 32, 40), predicted, true, [[0, 1]], preprocess)
    page, _ = pages(tmp_path, sample(pictured=rows))
    assert "The 2 labelled points are 5.00 pixels of the input off on average." in without_spaces(page.text)
    assert rows[0]["labelled"] == 2 and [tag for tag, _ in page.tags].count("img") == 1
