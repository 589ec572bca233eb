"""The report: self-contained, safe with whatever users name things, and calm when half of the facts are missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from okdc import report
from okdc.report.plots import apart, line_chart, ticks_for
from okdc.report.words import by_chance, cell, digits, duration, si, standard_error, uncertain

VOID = {"meta"}  # the only tag of the page that html does not close


def history(epochs: int, members: list[str], top: float = 97.2) -> list[dict[str, Any]]:
    """Curves as a training leaves them: a steep start, a plateau, parts of the loss that span decades."""
    rows = []
    for epoch in range(epochs):
        rest = math.exp(-6 * (epoch + 1) / epochs)
        wave = 0.25 * math.sin(1.7 * epoch) * (0.2 + rest)
        row = {
            "epoch": epoch,
            "train_loss": 0.4 + 6 * rest,
            "eval_loss": 0.12 + 2 * rest,
            "lr": 0.1 * (1 - epoch / epochs),
        }
        row |= {
            "eval_top1": top - 80 * rest + wave,
            "eval_top5": 99.9 - 40 * rest,
            "seconds": 2.1,
            "images_per_second": 812.0,
        }
        row |= {"skipped_steps": 0}
        for at, name in enumerate(members):
            row[f"loss/ce/{name}"] = (2.3 - 0.1 * at) * rest + 0.01 + 0.004 * at
            row[f"top1/{name}"] = row["eval_top1"] + (0.5 * at * (1 - rest) - 3 * at * rest + wave * at if at else 0)
            if at:
                row[f"loss/kd/ta{at}"] = 2.4 * rest * at + 1e-4 / at
        if len(members) > 1:
            row["top1/ensemble"] = row["eval_top1"] + 1.9 * (1 - rest) + 1.1 * rest
        rows.append(row)
    return rows


def timing(batch: int, p50: float) -> dict[str, Any]:
    return {
        "batch": batch,
        "p50_ms": p50,
        "p90_ms": p50 * 1.12,
        "p99_ms": p50 * 1.4,
        "images_per_second": 1000 * batch / p50,
    }


def verification() -> dict[str, Any]:
    same = {"top1": 97.22, "top5": 99.94, "mb": 44.7, "pass": True, "reason": None}
    close = {"agreement": 100.0, "max_abs": 2.1e-6, "mean_abs": 3e-7, "rel": 1.4e-7, "provider": "CPUExecutionProvider"}
    rows = [
        {
            **same,
            "name": "torch",
            "file": "model.safetensors",
            "provider": None,
            "agreement": 100.0,
            "max_abs": 0.0,
            "rel": 0.0,
        },
        {**same, **close, "name": "onnx", "file": "model.onnx"},
        {**same, **close, "name": "predict.py", "file": "predict.py"},
        {
            **same,
            **close,
            "name": "onnx int8",
            "file": "model.int8.onnx",
            "mb": 11.3,
            "top1": 95.1,
            "agreement": 96.4,
            "max_abs": 0.31,
        },
    ]
    rows[3] |= {"pass": False, "reason": "top-1 fell by 2.1 points; at most 1.0 was allowed (--max-drop)."}
    for row, (one, eight) in zip(rows, ((11.2, 61.0), (6.1, 42.5), (6.3, 43.0), (2.9, 19.8))):
        row["latency"] = [timing(1, one), timing(8, eight)]
    skipped = [
        {"target": "tensorrt", "reason": "no CUDA device was found; run okdc export --trt on the machine with the GPU."}
    ]
    return {
        "schema_version": 1,
        "verdict": "fail",
        "images": 360,
        "device": "cpu",
        "threads": 1,
        "rows": rows,
        "skipped": skipped,
    }


def sample(epochs: int = 30, members: int = 4, **changes: Any) -> dict[str, Any]:
    """Facts of resnet18 with ahbf on digits."""
    names = ["target", *(f"branch{at}" for at in range(1, members))]
    cost = [11.18e6, 13.54e6, 15.9e6, 18.26e6, 20.6e6, 23e6]
    flops = [1.82e9, 2.05e9, 2.28e9, 2.51e9, 2.74e9, 2.97e9]
    facts: dict[str, Any] = {
        "title": "digits-resnet18-ahbf",
        "network": {
            "name": "resnet18",
            "params": 11.18e6,
            "flops": 1.82e9,
            "input_size": [3, 224, 224],
            "cut": "layer3",
        },
        "method": {
            "name": "ahbf",
            "summary": "Branches of growing depth teach downwards through a chain of fusion modules.",
            "settings": {"temperature": 3.0, "ramp": 80},
        },
        "members": [
            {
                "name": name,
                "params": p,
                "flops": f,
                "shared_params": 2.78e6,
                "shared_flops": 1.4e9,
                "role": "target" if at == 0 else "branch",
            }
            for at, (name, p, f) in enumerate(zip(names, cost, flops))
        ],
        "data": {"name": "digits", "classes": 10, "train_images": 1437, "validation_images": 360},
        "history": history(epochs, names),
        "metrics": {"top1": 97.22, "top5": 99.94, "best_epoch": epochs, "ensemble_top1": 98.9, "seconds": 73.4},
        "verification": verification(),
        "baseline": None,
        "command": "okdc compress --model resnet18 --method ahbf --data digits --epochs 30 -b 64",
        "environment": {
            "python": "3.11.9",
            "torch": "2.15.0",
            "timm": "1.0.31",
            "cpu": "2 cores, AVX-512",
            "gpu": "none",
        },
        "recipe": {
            "network": {"model": "resnet18"},
            "method": {"name": "ahbf"},
            "data": {"data": "digits"},
            "train": {"epochs": epochs},
        },
        "okdc": "0.1.0",
    }
    return facts | changes


def control(epochs: int = 30) -> dict[str, Any]:
    metrics = {"top1": 95.8, "top5": 99.7, "best_epoch": epochs, "seconds": 31.0}
    return {"name": "resnet18-baseline-digits", "history": history(epochs, ["target"], top=95.8), "metrics": metrics}


class Page(HTMLParser):
    """Tags, and whether every one that was opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def pages(folder: Path, facts: dict[str, Any]) -> tuple[Page, str]:
    path = report.write(folder, facts)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8")), (folder / "report.md").read_text(encoding="utf-8")


def without_spaces(text: str) -> str:
    return " ".join(text.replace("\u00a0", " ").split())


def test_the_page_says_what_matters_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    page, markdown = pages(tmp_path, sample(baseline=control()))
    text = without_spaces(page.text)
    for words in (
        "resnet18 on digits: 97.2 % top-1 after stripping, +1.4 points over the baseline",
        "of 50.5 M trained", "1.84 × the speed of torch", "The student makes 34 % fewer errors",
        "top-1 fell by 2.1 points", "tensorrt was skipped: no CUDA device was found", "okdc compress --model resnet18",
    ):  # fmt: skip
        assert words in text
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|\bon\w+=|src=|href=", html)
    assert "+1.4 points" in markdown and "| onnx int8 | model.int8.onnx | fail |" in markdown
    assert "{{" not in html + markdown and "None" not in html + markdown and "nan" not in html


def test_curves_of_every_member_have_its_colour_everywhere(tmp_path: Path) -> None:
    page, _ = pages(tmp_path, sample(members=6, baseline=control()))
    lines = [attrs["class"] for tag, attrs in page.tags if tag == "path"]
    accuracy = {"student", "ensemble", "baseline", *(f"hue{at}" for at in range(5))}
    assert set(lines[: len(accuracy)]) == accuracy  # the target's own curve is the student's and is drawn once
    assert lines[len(accuracy) - 1] == "student"  # last, so nothing covers it
    hues = [attrs["class"] for tag, attrs in page.tags if tag == "span" and attrs.get("title") == "branch5"]
    assert hues == ["hue4", "hue4"]  # its top-1 and its cross entropy


def test_a_moving_average_that_ships_is_drawn_beside_the_target(tmp_path: Path) -> None:
    facts = sample()
    for row in facts["history"]:
        row["top1/target"] -= 1
    page, _ = pages(tmp_path, facts)
    assert {"student", "target"} <= {attrs["class"] for tag, attrs in page.tags if tag == "path"}


@pytest.mark.parametrize(("epochs", "members"), [(1, 1), (3, 4), (300, 6)])
def test_any_number_of_epochs_and_members_stays_inside_the_plot(tmp_path: Path, epochs: int, members: int) -> None:
    page, _ = pages(tmp_path, sample(epochs, members, verification=None))
    places = [
        float(p) for _, attrs in page.tags for p in re.findall(r"(?:left|width):([-\d.]+)%", attrs.get("style") or "")
    ]
    assert places and all(0 <= place <= 100 for place in places)
    assert ("Ensemble top-1" in page.text) == (members > 1)
    assert "nothing was exported" in page.text and f"okdc export {tmp_path}" in page.text


def test_what_is_missing_or_not_a_number_is_a_dash(tmp_path: Path) -> None:
    facts = sample(metrics={"top5": math.nan, "ensemble_top1": math.inf})
    facts["history"] = [
        {"epoch": 0, "train_loss": math.nan, "eval_top1": math.nan, "loss/ce/target": 0.0},
        {"epoch": 1},
    ]
    facts["verification"]["rows"] = [{"name": "torch", "latency": [{"batch": 1, "p50_ms": math.nan}]}]
    page, markdown = pages(tmp_path, facts)
    assert "top-5 –, best epoch –" in page.text and "| student top-1 | – (top-5 –, best epoch –) |" in markdown
    assert json.loads((tmp_path / "report.json").read_text())["metrics"] == {"top5": None, "ensemble_top1": None}
    _, markdown = pages(tmp_path, {})
    assert markdown.startswith("# network on data\n")


def test_names_and_commands_of_users_cannot_become_markup(tmp_path: Path) -> None:
    evil = "<script>alert('|')</script>"
    facts = sample(
        command=f"okdc compress --model '{evil}'", title=evil, recipe={"model": evil}, environment={evil: evil}
    )
    facts["network"]["name"] = facts["data"]["name"] = facts["members"][1]["name"] = facts["network"]["cut"] = evil
    for row in facts["history"]:
        row |= {f"loss/{evil}": 1.0, f"top1/{evil}": 50.0}
    facts["verification"]["rows"][1] |= {"name": evil, "reason": evil}
    facts["verification"]["skipped"][0]["reason"] = evil
    page, markdown = pages(tmp_path, facts)
    assert "script" not in {tag for tag, _ in page.tags} and evil in page.text
    table = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert not re.search(r"(?<!\\)<script", "\n".join(table))
    rows = [re.split(r"(?<!\\)\|", line) for line in table if line.startswith("|")]
    assert {len(row) for row in rows} == {4, 8, 12}  # two, six and ten cells: no name added one


def test_the_same_facts_give_the_same_bytes_and_json_keeps_them(tmp_path: Path) -> None:
    facts = sample(baseline=control())
    names = ("report.html", "report.md", "report.json", "results.png")
    report.write(tmp_path, facts)
    first = [(tmp_path / name).read_bytes() for name in names]
    report.write(tmp_path, dict(reversed(facts.items())))
    assert first == [(tmp_path / name).read_bytes() for name in names]
    assert json.loads(first[2]) == json.loads(json.dumps(facts))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_report_that_cannot_be_made_leaves_the_last_one_alone(tmp_path: Path) -> None:
    report.write(tmp_path, sample())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(AttributeError):
        report.write(tmp_path, sample(3, history=["not a row"]))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_members_that_report_only_what_they_add_are_added_up(tmp_path: Path) -> None:
    facts = sample()
    for member in facts["members"][1:]:
        member |= {"params": 8.4e6, "own_params": 8.4e6, "shared_params": 0, "flops": 0.4e9, "shared_flops": 0}
    facts["members"][0] |= {"shared_params": 0, "shared_flops": 0}
    page, _ = pages(tmp_path, facts)
    assert "of 36.4\u00a0M trained" in page.text and "Pale" not in page.text
    assert "of 40.0\u00a0M trained" in pages(tmp_path, facts | {"trained_params": 40e6})[0].text


def test_numbers_read_well() -> None:
    assert [digits(v) for v in (0.81234, 6.1, 12.34, 148.2, 1480.0, 0, None)] == [
        "0.812", "6.10", "12.3", "148", "1,480", "0", "–",
    ]  # fmt: skip
    assert [si(v) for v in (640, 11.18e6, 1.82e9, 89.29, None)] == [
        "640",
        "11.2\u00a0M",
        "1.82\u00a0G",
        "89.3",
        "–",
    ]
    assert [duration(v) for v in (2.14, 59.7, 73.4, 7300)] == ["2.1 s", "1 min 0 s", "1 min 13 s", "2 h 1 min"]
    assert cell("a|b\n<c>") == r"a\|b \<c>"


def test_ticks_are_round_and_hold_the_curve() -> None:
    assert ticks_for(81.3, 97.2) == [80, 85, 90, 95, 100]
    assert ticks_for(0.0, 0.0) == [0, 0.2] and ticks_for(100.0, 100.0)[-1] == 100
    chart = line_chart([("kd", "hue0", [(1.0, 3e-4), (2.0, 0.0), (3.0, 0.2)])], 190)
    assert (
        chart and chart["log"] and [tick["text"] for tick in chart["yticks"]] == ["0.0001", "0.001", "0.01", "0.1", "1"]
    )
    assert len(chart["lines"][0]["places"]) == 2  # a zero has no place on a logarithmic axis


def test_labels_never_cover_each_other_nor_leave_the_plot() -> None:
    moved = apart([1.0, 0.5, 50.0, 50.1, 50.2, 99.9, 100.0], gap=6.0)
    assert all(right - left > 5.99 for left, right in zip(sorted(moved), sorted(moved)[1:]))
    assert moved[1] == 0.5 and max(moved) == 100


def test_a_gain_is_called_what_it_is(tmp_path: Path) -> None:
    facts = sample(baseline=control() | {"metrics": {"top1": 90.625}})
    facts["metrics"]["top1"], facts["data"]["validation_images"] = 92.7083, 96
    page, markdown = pages(tmp_path, facts)
    text = without_spaces(page.text)
    assert "+2.1 points over the baseline, within chance" in text and "± 2.7 on 96 images" in text
    assert "The difference is 2 of 96 images. Chance alone makes differences of up to ±8.1 points" in text
    assert "± 3.0 on 96 images" in markdown and "The difference is 2 of 96 images" in markdown
    facts["metrics"]["top1"] = 100.0
    page, markdown = pages(tmp_path, facts)
    for text in (without_spaces(page.text), markdown):
        assert "100.0 % on 96 images" in text.replace("\u00a0", " ") and "± 0.0" not in text, "of all there is no error"
    assert "The difference is 9 of 96 images. Chance alone makes differences of up to ±6.3 points" in text
    facts["metrics"]["top1"], facts["data"]["validation_images"] = 92.7083, 9600
    assert "within chance" not in pages(tmp_path, facts)[0].text


def test_of_the_ensemble_is_said_when_it_was_as_good_and_that_the_student_is_another(tmp_path: Path) -> None:
    page, markdown = pages(tmp_path, sample())
    assert "+1.7 points compared with the student, at the same epoch" in without_spaces(page.text)
    assert "| ensemble top-1 | 98.9 %" in without_spaces(markdown)
    facts = sample()
    facts["metrics"]["top1"] = None
    assert "all members together, at the student's epoch" in pages(tmp_path, facts)[0].text


def test_standard_errors_are_those_of_a_share() -> None:
    assert standard_error(90.0, 100) == pytest.approx(3.0) and standard_error(None, 100) is None
    assert uncertain(100.0, 96) == " on 96 images" and uncertain(50.0, 1) == " ± 50.0 on 1 image"
    # Two of a hundred right in each: (2 + 1) / (100 + 2) in both.
    assert by_chance(2.0, 2.0, 100) == pytest.approx(196 * math.sqrt(2 * (3 / 102) * (99 / 102) / 102))
    assert by_chance(100.0, 100.0, 96) > 1, "no mistake on 96 images is no certainty"


def test_a_report_without_control_says_how_to_get_one(tmp_path: Path) -> None:
    asks = "okdc compress --recipe 'my runs/a/recipe.yaml' --method baseline --experiment a-baseline"
    page, markdown = pages(tmp_path, sample(control_command=asks, again="okdc compress --recipe r.yaml"))
    assert "No baseline yet" in page.text and asks in page.text and f"    {asks}\n" in markdown
    assert "makes the same run again" in page.text and "okdc compress --recipe r.yaml" in page.text
    page, _ = pages(tmp_path, sample(baseline=control(), control_command=asks))
    assert "No baseline yet" not in page.text and "makes the same run again" not in page.text


def test_losses_of_all_members_and_of_the_student_have_axes_of_their_own(tmp_path: Path) -> None:
    titles = re.findall(
        r"<h3>((?:total|of the)[^<]*)", (pages(tmp_path, sample()), tmp_path / "report.html")[1].read_text()
    )
    assert [title.strip() for title in titles] == ["total of all members", "of the student, in validation"]
    pages(tmp_path, sample(members=1))
    assert re.findall(r"<h3>(total[^<]*)", (tmp_path / "report.html").read_text()) == ["total"]


def test_every_speed_up_is_by_the_clock_of_the_recommendation(tmp_path: Path) -> None:
    facts = sample()
    for row in facts["verification"]["rows"]:
        for timing in row.get("latency", []):
            timing |= {"contended": False, "cpu_ms": timing["p50_ms"] / (1 if row["name"] == "torch" else 2)}
    page, _ = pages(tmp_path, facts)
    assert "3.67 × the speed of torch, by CPU time" in page.text and "1.84 ×" not in page.text


def test_a_page_serves_those_who_see_no_colour_and_use_no_mouse(tmp_path: Path) -> None:
    page = report.write(tmp_path, sample()).read_text(encoding="utf-8")
    table = page[page.index("<h2>Verification") :]
    table = table[: table.index("</table>")]
    assert 'tabindex="0" role="region" aria-label=' in table and "<caption>" in table
    assert "<th>" not in table and table.count('<th scope="col">') == 8
    assert "p90 " in re.sub(r"<[^>]*>", "", page)  # in words, not in a tooltip alone
    dashes = re.findall(r"path\.(\w+) \{[^}]*stroke-dasharray: ([^;}]+)", page)
    assert len({pattern for _, pattern in dashes}) == len(dashes) >= 7
