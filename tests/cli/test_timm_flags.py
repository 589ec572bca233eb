"""A command line of timm's: what means the same is understood, and of the rest is said what to type."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from okdc.cli import flags, timm_flags
from tests.cli.test_cli import okdc


@pytest.mark.parametrize(
    "words, said",
    [
        ("--scale 0.5 1.0 .", {"scale": [0.5, 1.0]}),
        (". --mean .5 .5 .5 --std 0.5,0.5,0.5", {"mean": [0.5] * 3, "std": [0.5] * 3}),
        ("--decay-milestones 3 4 -j 0 --opt-betas 0.9 1e-1 .",
         {"decay_milestones": [3, 4], "workers": 0, "opt_betas": [0.9, 0.1]}),
        ("--model-kwargs depth=2 act=relu . --opt-kwargs a=1", {"model_kwargs": {"depth": 2, "act": "relu"},
         "opt_kwargs": {"a": 1}}),
        ("--peers resnet18 .", {"peers": ["resnet18"]}),
        ("--no-prefetcher . --fuser nvfuser --pin-mem --dist-bn=reduce --dr 0.2", {"decay_rate": 0.2}),
    ],
)  # fmt: skip
def test_a_command_line_of_timms_is_understood(words: str, said: dict[str, Any]) -> None:
    found: dict[str, Any] = {}

    @click.command(cls=flags.GroupedCommand, timm=True)
    @click.argument("folder")
    @flags.settings("network", "cohort", "data", "train")
    def command(folder: str, **_: Any) -> None:
        found.update(flags.given(), folder=folder)

    result = CliRunner().invoke(command, words.split(), catch_exceptions=False)
    assert result.exit_code == 0 and found == {**said, "folder": "."}, result.output
    notes = [line.split()[0] for line in result.stderr.splitlines()]
    assert notes == [flag for flag in ("--no-prefetcher", "--fuser", "--pin-mem", "--dist-bn") if flag in words]


def test_what_of_timms_is_not_there_says_what_to_type() -> None:
    for flag, advice in timm_flags.REFUSED.items():
        refused = okdc("compress", flag, "1")
        told = " ".join(refused.stderr.split())
        assert refused.exit_code == 2 and f"{flag} is a flag of timm" in told and advice in told
        assert max(map(len, refused.stderr.splitlines())) <= 80
    several = okdc("compress", "/images", "--aug-splits", "3", "--resplit", "--jsd", "--dist-bn", "reduce")
    told = " ".join(several.stderr.split())
    assert several.exit_code == 2 and "3 flags of timm are here that okdc does not have. --aug-splits: --method" in told
    assert "--jsd: methods have their own losses" in told and "--dist-bn" not in told
    twice = okdc("compress", "/images", "--data", "/other")
    assert twice.exit_code == 2 and "given twice: /images and --data /other" in " ".join(twice.stderr.split())
    missing = okdc("compress", "/nope")
    assert missing.exit_code == 2 and "--data '/nope' does not exist" in missing.stderr
    assert "Did you mean" not in missing.stderr
