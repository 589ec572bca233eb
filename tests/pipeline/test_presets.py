"""Presets: what a folder of photos is trained with, what keeps them off, and what is done without weights to start."""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from okdc import methods, networks, recipe
from okdc.cli import main
from okdc.data.images import Images
from okdc.errors import NetworkError, RecipeError
from okdc.pipeline import compress, control, facts, forecast, presets
from okdc.pipeline.opening import small_images
from okdc.recipe import FINETUNE, SCRATCH, NetworkSettings, Recipe, default_preset
from okdc.system import busy, saying


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of twenty images of 16 x 16 pixels, each class brighter in one channel."""
    folder, noise = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for channel, name in enumerate(("daisy", "rose", "tulip")):
        (folder / name).mkdir()
        for number in range(20):
            pixels = noise.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def okdc(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def said(result: Result) -> str:
    return " ".join(result.output.split())


SMALL = ("--model", "resnet20_cifar", "--img-size", "16", "-j", "0", "--no-onnx", "--set", "train.device=cpu")


@pytest.mark.parametrize(
    ("flat", "sets", "expected"),
    [
        ({"data": "photos"}, [], FINETUNE),
        ({"data": "labels.csv", "batch_size": 16, "model": "resnet50", "members": 4}, [], FINETUNE),
        ({}, ["data.data=photos"], FINETUNE),
        ({"data": "digits"}, [], None),
        ({"data": "torch/cifar10"}, [], None),
        ({"data": "arrays.npz"}, [], None),
        ({"data": "photos", "method": "ahbf"}, [], None),
        ({"data": "photos"}, ["train.lr=0.1"], None),
        ({"data": "photos"}, ["method.name=dml"], None),
        ({}, [], None),
    ],
)
def test_photos_are_finetuned_unless_it_is_said_how_to_train(flat: dict, sets: list[str], expected: str | None) -> None:
    assert default_preset(flat, sets)[0] == expected


def test_what_keeps_the_preset_off_is_named() -> None:
    assert default_preset({"data": "photos", "epochs": 3, "method": None}, ["train.lr=1"]) == (None, ["epochs", "lr"])


def test_a_preset_gives_way_to_what_is_typed() -> None:
    found = recipe.resolve(recipe.preset_recipe(FINETUNE), flat={"data": "photos", "epochs": 3, "members": 2})
    assert found.network.pretrained and found.method["name"] == "one"
    assert (found.train.epochs, found.cohort.members, found.train.warmup_epochs) == (3, 2, 1)
    assert recipe.resolve(recipe.preset_recipe(SCRATCH), flat={"data": "photos"}).train == Recipe().train
    other = recipe.resolve(recipe.preset_recipe(FINETUNE), flat={"data": "photos", "method": "ahbf"})
    assert other.cohort == Recipe().cohort, "members are those of the preset's own method"


def test_without_weights_it_learns_from_scratch_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def make(name: str) -> Recipe:
        return recipe.resolve(name, flat={"data": "digits", "model": "resnet20_cifar"})

    preset, found = presets.settle(FINETUNE, make, {})
    assert preset == SCRATCH and not found.network.pretrained
    assert (found.train.epochs, found.train.batch_size, found.train.lr_base) == (100, 32, 0.1)
    told = capsys.readouterr().err
    assert "resnet20_cifar has no pre-trained weights" in told and "--preset scratch" in told
    asked = presets.settle(FINETUNE, make, {"pretrained": True})
    assert asked[0] == FINETUNE and asked[1].network.pretrained, "whoever asks for weights gets them, or the error"
    assert "is a function" in str(networks.lacks_weights(NetworkSettings("tests.helpers.networks:Tiny")))
    with pytest.raises(NetworkError, match="no network 'resnet0'"):
        networks.lacks_weights(NetworkSettings("resnet0", pretrained=True))


def test_few_photos_without_weights_end_with_what_to_type(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["compress", "--data", str(photos), *SMALL]
    monkeypatch.setattr(sys, "argv", ["okdc", *words])
    result = okdc(*words)
    assert result.exit_code == 2 and "resnet20_cifar has no pre-trained weights" in said(result)
    assert "your 54 images, which are too few" in said(result) and "on this CPU" in said(result)
    typed = [line.strip() for line in result.stderr.splitlines() if line.startswith("  okdc ")]
    given = shlex.join(["okdc", *words])
    assert typed == [f"{given} --preset finetune --checkpoint FILE", f"{given} --preset scratch"], "not wrapped"


def test_a_preset_beside_a_recipe_is_refused() -> None:
    for words in (
        ["--recipe", "digits/resnet18-ahbf", "--preset", SCRATCH],
        ["--resume", "runs/x", "--preset", SCRATCH],
    ):
        result = okdc("compress", *words)
        assert result.exit_code == 2 and "eave it out" in said(result).replace("eave one of them out", "eave it out")
    with pytest.raises(RecipeError, match="expected finetune or scratch"):
        compress("resnet20_cifar", data="digits", preset="finetoon")


def test_missing_data_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    code = f"""if True:
        import sys
        from okdc.cli import main
        try:
            main(["compress", "--data", {str(tmp_path / "flower")!r}])
        except SystemExit as done:
            print(done.code, "torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 False"
    words = " ".join(done.stderr.split())
    assert "does not exist" in words and words.endswith("flowers?")


def test_the_first_line_comes_before_torch(photos: Path) -> None:
    code = f"""if True:
        import sys
        from okdc.cli import early, main
        early.choose_preset = lambda *_: sys.exit(f"torch imported: {{'torch' in sys.modules}}")
        main(["compress", "--data", {str(photos)!r}])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    first, second = done.stderr.splitlines()
    assert first == f"okdc 0.1.0 · reading {photos}" and second == "torch imported: False"


# --- the control ----------------------------------------------------------------------------------------------------


def test_the_control_is_trained_beside_the_run_once(photos: Path, tmp_path: Path) -> None:
    words = ("compress", "--data", photos, *SMALL, "--output", tmp_path, "--preset", SCRATCH, "--epochs", "1", "-b", 16)
    first = okdc(*words, "--with-baseline")
    assert first.exit_code == 0, first.output
    name = f"resnet20_cifar-one-{photos.name}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}-baseline"]
    alone, run = (recipe.load(tmp_path / folder / "recipe.yaml") for folder in (f"{name}-baseline", name))
    assert alone.method["name"] == "baseline" and (alone.train, alone.data) == (run.train, run.data)
    assert (tmp_path / name / "report.html").read_text().count(f"{name}-baseline"), "the report knows its baseline"
    told = json.loads((tmp_path / name / "report.json").read_text())["same_rate"]
    assert f"{told}\n" in first.output and "The baseline had the learning rate of the run, 0.00625. " in told
    program, command, *typed = shlex.split(told.partition(" type: ")[2])
    asked = main.commands[command].make_context(command, typed).params
    assert (program, asked["methods"], asked["tune"]) == ("okdc", ["one"], "lr") and Path(asked["recipe"]).is_file()
    again = okdc(*words, "--with-baseline")
    assert again.exit_code == 0 and "First the baseline" not in again.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}-2", f"{name}-baseline"]


def test_the_control_of_several_processes_is_refused(photos: Path) -> None:
    refused = okdc("compress", "--data", photos, *SMALL, "--method", "one", "--devices", "2", "--with-baseline")
    assert refused.exit_code == 2 and "these are several" in said(refused)


def test_plain_training_is_its_own_control(tmp_path: Path) -> None:
    control.train_control(recipe.resolve(flat={"method": "baseline", "data": "digits"}), tmp_path, None, None)
    assert not list(tmp_path.iterdir())


def test_the_commands_of_a_report_are_whole(photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "my runs"
    words = ("--method", "one", "--epochs", "1", "-b", 16, "--output", output, "--experiment", "first one")
    result = okdc("compress", "--data", photos, *SMALL, *words)
    assert result.exit_code == 0, result.output
    facts = json.loads((output / "first one" / "report.json").read_text())
    assert facts["baseline"] is None and facts["control_command"] in result.output
    for command, folder in ((facts["control_command"], "first one-baseline"), (facts["again"], None)):
        again = okdc(*shlex.split(command)[1:])
        assert again.exit_code == 0, again.output
        made = output / folder if folder else output / f"resnet20_cifar-one-{photos.name}"
        mine, first = (recipe.load(path / "recipe.yaml") for path in (made, output / "first one"))
        assert (mine.network, mine.data, mine.train) == (first.network, first.data, first.train)
        assert mine == first or folder
    told = json.loads((made / "report.json").read_text())
    assert told["baseline"]["name"] == "first one-baseline" and told["metrics"]["top1"] == facts["metrics"]["top1"]


def test_what_goes_on_is_what_was_typed_and_the_run_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words, told in (
        (["okdc", "compress", "my photos", "-b", "8"], "okdc compress --resume auto 'my photos' -b 8"),
        (["okdc", "compress", "--resume", "runs/a"], "okdc compress --resume runs/a"),
        (["program.py"], "okdc compress --resume runs/a/last.pth.tar"),
    ):
        monkeypatch.setattr(sys, "argv", words)
        assert facts.continuing(Path("runs/a/last.pth.tar")) == told
    words = ["compress", "--data", "digits", *SMALL, "--method", "baseline", "-b", "512", "--output", str(tmp_path)]
    first = [*words, "--experiment", "a", "--epochs", "1"]
    second = [*words, "--experiment", "a", "--epochs", "2", "--resume", "auto"]
    for words in (first, second):
        monkeypatch.setattr(sys, "argv", ["okdc", *words])
        assert okdc(*words).exit_code == 0
    typed = [shlex.join(["okdc", *words]) for words in (first, second)]
    assert json.loads((tmp_path / "a" / "report.json").read_text())["command"].splitlines() == typed
    assert "\n    ".join(typed) in (tmp_path / "a" / "report.md").read_text()


# --- what is said ---------------------------------------------------------------------------------------------------


def test_a_screen_says_what_is_done_and_the_log_keeps_it(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "disturbing", lambda: 0.0)  # by the programs beside this test
    words = ("compress", "--data", photos, *SMALL, "--method", "one", "--epochs", "2", "-b", 16, "--output", tmp_path)
    result = okdc(*words, "--experiment", "a", "--onnx")
    assert result.exit_code == 0, result.output
    told, _, rest = result.stderr.partition("epoch 1/2")
    assert max(map(len, told.replace(str(tmp_path), "").splitlines())) <= 80
    for line in (
        "272,019 parameters, images of 16 x 16 pixels", "54 training images and 6 validation images, 3 classes",
        "one, 3 members. Adds branches to a shared trunk.", "2 epochs of 3 steps, 16 images per step, learning rate",
        "times the FLOPs of the network alone", "By the steps that were tried, training takes about 10 seconds on this",
    ):  # fmt: skip
        assert line in " ".join(told.split())
    assert "Ensemble, top-1, does not ship" in result.output
    assert rest.index("writing 1 of 1: model.onnx") < rest.index("timing 2 of 3: onnx")
    log = (tmp_path / "a" / "run.log").read_text()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(  |$)", line) for line in log.splitlines())
    kept = " ".join(re.sub(r"(?m)^.{19}", "", log).split())
    assert " ".join(result.stderr.split()) in kept and "Student, top-1, ships" in kept, "tables, too"


def test_quiet_says_results_alone_and_verbose_where_an_error_arose(photos: Path, tmp_path: Path) -> None:
    words = ("compress", "--data", photos, *SMALL, "--method", "baseline", "--epochs", "1", "-b", 16)
    result = okdc(*words, "--output", tmp_path, "--experiment", "a", "-q")
    assert result.exit_code == 0 and result.stderr == "" and "Student, top-1" in result.output
    assert not saying.quiet, "a program that ran the command says what it says"
    assert "epoch 1/1" in (tmp_path / "a" / "run.log").read_text()
    again = okdc(*words, "--output", tmp_path, "--experiment", "a", "-v")
    assert "Traceback" in again.stderr and "never written over" in said(again)
    assert logging.getLogger().level > logging.INFO, "likewise"
    assert "Traceback" not in okdc(*words, "--output", tmp_path, "--experiment", "a").stderr


def test_the_time_is_told_before_it_is_spent_and_what_takes_less(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "disturbing", lambda: 0.0)  # by the programs beside this test
    typed = {"data": str(photos), "model": "resnet20_cifar", "img_size": 160, "device": "cpu"}
    found = forecast.forecast(recipe.resolve(recipe.preset_recipe(SCRATCH), flat=typed), control=True)
    assert found and found.run > found.control > 0 and found.epochs == 100 and found.smaller is None, "a size was typed"
    short = " ".join(forecast.told(forecast.Forecast(20, 4, 2)).split())
    assert short == (
        "By the steps that were tried, training takes about 2 minutes on this CPU, with the baseline (40 seconds of "
        "it)."
    )
    told = forecast.told(forecast.Forecast(20, 50, 25, smaller=0.25)).splitlines()
    assert "about 25 minutes on this CPU" in told[0] and max(map(len, told)) <= 80
    rows = [line.split("about ") for line in told if line.startswith("  --")]
    assert [(flags.strip(), takes) for flags, takes in rows] == [
        ("--no-baseline", "17 minutes"), ("--img-size 128", "6 minutes"), ("--img-size 128 --no-baseline", "4 minutes"),
    ]  # fmt: skip
    assert "--epochs 5 " in forecast.told(forecast.Forecast(20, 75, 0))
    short = " ".join(forecast.told(forecast.Forecast(20, 4, 2, after=40)).split())
    assert short.endswith("Export and verification take about 40 seconds more.")


def test_no_time_is_told_where_other_programs_use_the_cores(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forecast, "disturbing", lambda: 1.6)
    typed = {"data": str(photos), "model": "resnet20_cifar", "device": "cpu"}
    assert forecast.forecast(recipe.resolve(recipe.preset_recipe(SCRATCH), flat=typed), control=True) is None
    told = capsys.readouterr().err
    assert told.startswith("Other programs use 1.6 of the ") and "--no-baseline" in told and "minutes" not in told
    assert max(map(len, told.splitlines())) < 80


@pytest.mark.parametrize(
    "typed",
    [{"method": "lmcl"}, {"method": "kd"}, {"torchcompile": True}, {"model": "tests.helpers.networks:Tiny"}],
    ids=str,
)
def test_no_time_is_told_of_what_cannot_be_tried_as_it_runs(typed: dict[str, Any]) -> None:
    typed = {"data": "digits", "model": "resnet20_cifar", "img_size": 16, "method": "one", "device": "cpu", **typed}
    assert forecast.forecast(recipe.resolve(None, flat=typed, method_settings=methods.settings), control=False) is None


def test_steps_are_tried_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[bool, bool, bool]] = []

    def pace(method: methods.Method, *_: object) -> tuple[float, float]:
        network: Any = method.cohort.target
        tried.append(
            (torch.is_autocast_enabled("cpu"), network.layer1[0].conv1.weight.requires_grad, network.grad_checkpointing)
        )
        return 0.01, 0.03

    monkeypatch.setattr(methods, "pace", pace)
    monkeypatch.setattr(forecast, "disturbing", lambda: 0.0)
    typed: dict[str, Any] = {"data": "digits", "model": "test_resnet", "img_size": 32, "method": "one", "device": "cpu"}
    for given in ({}, {"amp": True, "freeze": ["layer1"], "grad_checkpointing": True}):
        asked = recipe.resolve(None, flat=typed | given, method_settings=methods.settings)
        assert (found := forecast.forecast(asked, control=False)) and found.run > 40
    assert tried == [(False, True, False), (True, False, True)]


def test_what_other_programs_use_is_not_what_this_one_uses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = tmp_path / "stat"
    monkeypatch.setattr(busy, "_ALL", told)
    with busy.Others() as others:  # nothing is known of them
        pass
    assert others.cores == 0
    told.write_text("cpu  1000 0 0 5000 0 0 0 0 0 0\n")
    with busy.Others() as others:
        told.write_text("cpu  1900 100 0 5000 0 0 0 0 0 0\n")  # ten seconds of others within a moment
    assert others.cores > 5
    with busy.Others() as others:
        sum(range(1_000_000))
    assert others.cores == 0


def test_images_much_smaller_than_the_input_are_told() -> None:
    images = Images([(Image.new("L", (40, 28)), 0)] * 3, torch.zeros(3, dtype=torch.int64), "x")
    assert "--small-input --img-size 64" in str(small_images(images, (3, 224, 224), "resnet18"))
    assert small_images(images, (3, 64, 64), "resnet18") is None
    assert small_images(iter(()), (3, 224, 224), "resnet18") is None, "a stream cannot be looked at"
