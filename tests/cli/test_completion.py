"""The Tab key: the names and values that it offers are those there are, and it loads no torch."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from okdc.cli import main


def test_names_are_completed_without_torch() -> None:
    from okdc import methods
    from okdc.cli import completion

    assert completion.complete_method(None, None, "") == methods.names()
    assert completion.complete_method(None, None, "ah") == ["ahbf"]
    assert completion.complete_recipe(None, None, "presets/") == ["presets/finetune-one", "presets/scratch-one"]
    for command in ("compress", "profile"):
        options = {each.name: each for each in main.commands[command].params}
        found = options["method"].shell_complete(click.Context(main.commands[command]), "ah")
        assert [each.value for each in found] == ["ahbf"]


def completed(line: str) -> list[tuple[str, str]]:
    """What the Tab key offers at the end of `line`: the kind, which is plain or file, and the value."""
    words = line.split(" ")[1:]
    offered = ShellComplete(main, {}, "okdc", "_OKDC_COMPLETE").get_completions(words[:-1], words[-1])
    return [(each.type, each.value) for each in offered]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("okdc compress --task mu", [("plain", "multilabel")]),
        ("okdc compress --recipe presets/", [("plain", "presets/finetune-one"), ("plain", "presets/scratch-one")]),
        ("okdc compress --recipe ./mine", [("file", "./mine")]),
        ("okdc compress --model resnet20_", [("plain", "resnet20_cifar")]),
        ("okdc inspect torchvision/resnet15", [("plain", "torchvision/resnet152")]),
        ("okdc compress --peers resnet18,resnet20_", [("plain", "resnet18,resnet20_cifar")]),
        ("okdc compare --methods one,dm", [("plain", "one,dml")]),
        ("okdc compress flo", [("file", "flo")]),
        ("okdc compress --data flo", [("file", "flo")]),
        ("okdc export runs/x --runtimes openc", [("plain", "opencv")]),
        ("okdc export runs/x --tri", [("plain", "--triton")]),
    ],
)
def test_the_tab_key_completes_values(line: str, expected: list[tuple[str, str]]) -> None:
    assert completed(line) == expected


def test_what_is_completed_is_what_there_is() -> None:
    from okdc import networks, tasks
    from okdc.cli import completion
    from okdc.deploy import runtimes

    assert completion.complete_model(None, None, "") == sorted(networks.names())
    assert completion.complete_task(None, None, "") == tasks.names()
    assert completion.complete_runtime(None, None, "") == sorted(["auto", *runtimes.known()])


def test_a_name_of_a_network_is_completed_without_importing_it() -> None:
    code = """if True:
        import sys
        from okdc.cli import completion
        assert completion.complete_model(None, None, "resnet18d") == ["resnet18d"]
        print([name for name in ("torch", "timm", "torchvision", "numpy", "rich") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
