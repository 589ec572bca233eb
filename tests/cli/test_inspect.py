"""`okdc inspect`: stages and cuts of a network, what a method would build of it, and what it refuses."""

from __future__ import annotations

import pytest
from click.testing import Result

from tests.cli.test_cli import okdc


def test_inspect_shows_stages_and_cuts() -> None:
    shown = okdc("inspect", "resnet20_cifar", "--num-classes", "10")
    assert shown.exit_code == 0, shown.output
    for words in ("272,474 parameters", "3x32x32", "stages.1", "default", "okdc compress --model resnet20_cifar"):
        assert words in " ".join(shown.output.split())
    chosen = okdc("inspect", "resnet20_cifar", "--cut", "stages.0", "--img-size", "16")
    assert "asked for" in chosen.output and "3x16x16" in chosen.output
    wrong = okdc("inspect", "resnet20_cifar", "--cut", "stages.7")
    assert wrong.exit_code == 2 and "stages.0" in wrong.stderr
    unknown = okdc("inspect", "resnet20_cifra")
    assert unknown.exit_code == 2 and "resnet20_cifar" in unknown.stderr


@pytest.mark.parametrize(
    ("name", "reason"), [("ByData", "which modules run depends on the images"), ("Growing", "gives other logits")]
)
def test_inspect_offers_no_cut_that_compress_refuses(name: str, reason: str) -> None:
    shown = okdc("inspect", f"tests.helpers.traps:{name}", "--img-size", "32")
    said = " ".join(shown.output.split())
    assert shown.exit_code == 0 and "No branch can part after" in said and reason in said and "Next:" not in said


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--all --in-chans 1 --cut layer2", "--in-chans --cut: only for one network. Type: okdc inspect NAME"),
        ("--all --method one", "--method: only for one network"),
        ("resnet18 --families", "Type: okdc inspect --all --families ..."),
        ("resnet18 --filter x* --jobs 3", "--filter --jobs: only for many networks"),
        ("resnet18 --onnx", "Type: okdc inspect --all --filter resnet18 --onnx ..."),
    ],
)
def test_inspect_refuses_what_it_would_ignore(words: str, advice: str) -> None:
    refused = okdc("inspect", *words.split())
    assert refused.exit_code == 2 and advice in " ".join(refused.stderr.split())


def test_inspect_shows_what_a_method_would_build() -> None:
    def told(result: Result) -> str:
        return " ".join(result.output.split())

    words = ("inspect", "resnet20_cifar", "--num-classes", "10", "--method")
    shown = told(
        okdc(*words, "ahbf", "--members", "3", "--extra-blocks", "4", "-b", "64", "--method-kwargs", "attention=se")
    )
    for said in ("ahbf around resnet20_cifar, 3x32x32, 10 classes: 3 networks", "ships", "8 x BasicBlock", "stages.1"):
        assert said in shown
    assert "times the FLOPs of the target alone" in shown and "for a batch of 64" in shown and "branch3" not in shown
    peers = told(okdc(*words, "dml", "--peers", "resnet32_cifar"))
    assert "peer network" in peers and "466,906" in peers
    assert "stands in for it" in told(okdc(*words, "kd"))
    refused = okdc(*words, "one", "--share", "none")
    assert refused.exit_code == 2 and "nothing is shared" in told(refused)
    alone = okdc("inspect", "resnet20_cifar", "--members", "3")
    assert alone.exit_code == 2 and "add --method NAME" in told(alone)
