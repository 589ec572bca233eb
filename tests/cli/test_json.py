"""--json: one document on stdout and nothing else, from every command that prints a table."""

from __future__ import annotations

import json
from typing import Any

import click
from click.testing import CliRunner, Result

from okdc import methods, recipe
from okdc.cli import flags, main
from okdc.cli.output import show


def okdc(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def found(*words: str) -> Any:
    told = okdc(*words, "--json")
    assert told.exit_code == 0, told.output
    return json.loads(told.stdout)


def test_every_command_has_the_options_that_all_have() -> None:
    for command in main.commands.values():
        flags_of = {flag for each in command.params for flag in each.opts}
        assert {"--json", "-q", "--quiet", "-v", "--verbose"} <= flags_of, command.name


def test_what_there_is_to_choose_from_is_json() -> None:
    listed = found("methods")
    assert [each["name"] for each in listed] == methods.names()
    assert found("methods", "ahbf") == next(each for each in listed if each["name"] == "ahbf")
    assert {"name": "temperature", "default": 3.0, "type": "float"} in found("methods", "ahbf")["settings"]
    assert [each["name"] for each in found("recipes")] == recipe.names()
    assert found("recipes", "presets/finetune-one")["train"]["epochs"] == 20


def test_what_a_network_is_made_of_is_json() -> None:
    parts = found("inspect", "resnet20_cifar", "--num-classes", "10")
    assert parts["params"] == 272474 and parts["default_cut"] == parts["cut"] == "stages.1" and parts["refused"] is None
    assert {"name": "stages.1", "shape": [32, 16, 16]}.items() <= next(
        each for each in parts["cuts"] if each["name"] == "stages.1"
    ).items()
    built = found("inspect", "resnet20_cifar", "--num-classes", "10", "--method", "one", "-b", "64")
    assert [each["name"] for each in built["networks"]] == ["target", "branch1", "branch2"]
    assert (built["method"], built["batch_size"]) == ("one", 64) and built["memory"] > 64 * built["activations"]
    refused = okdc("inspect", "resnet20_cifar", "--cut", "nowhere", "--json")
    assert refused.exit_code == 2 and refused.stdout == "" and "nowhere" in refused.stderr


def test_whatever_else_is_printed_goes_to_stderr() -> None:
    @click.command(cls=flags.GroupedCommand)
    def command() -> None:
        print("a library's note")
        show({"accuracy": 97.5}, lambda: print("a table"))

    told = CliRunner().invoke(command, ["--json"])
    assert json.loads(told.stdout) == {"accuracy": 97.5} and told.stderr == "a library's note\n"
    assert CliRunner().invoke(command, []).stdout == "a library's note\na table\n"
