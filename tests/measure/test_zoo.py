"""Networks by name: a few of every kind in every run, all of timm's families and torchvision with `pytest -m zoo`."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torchvision
from click.testing import CliRunner

from okdc import networks
from okdc.anatomy import inspect
from okdc.anatomy.shapes import same_size
from okdc.cli import main
from okdc.errors import NetworkError, RunError
from okdc.measure import trial, zoo
from okdc.recipe import NetworkSettings

TABLES = Path(__file__).parents[1] / "zoo"
NO_TIME = zoo.Budget(seconds=0.0)
FAST = {  # name: default cut and what is appended, on images of 64 x 64
    "test_resnet": ("layer3", "1 x BasicBlock after layer4.0"),
    "test_vit": ("blocks.3", "1 x Block after blocks.5"),
    "test_convnext": ("stages.2", "1 x ConvNeXtBlock after stages.3.blocks.1"),
    "test_coatnet": ("stages.2", "1 x TransformerBlock2d after stages.3"),
    "test_mambaout": ("stages.2", "1 x GatedConvBlock after stages.3.blocks.0"),
    "mobilenetv3_small_050": ("blocks.3", "1 x InvertedResidual after blocks.4.2"),
    "ghostnet_050": ("blocks.6", "1 x GhostBottleneck after blocks.8.3"),
    "regnetx_002": ("s3", "1 x Bottleneck after s4.b7"),
    "edgenext_xx_small": ("stages.2", "1 x SplitTransposeBlock after stages.3.blocks.1"),
    "mobilevit_xxs": ("stages.3", "1 x MobileVitBlock after stages.4.1"),
    "hgnetv2_b0": ("stages.2", "1 x HighPerfGpuBlock after stages.3"),
    "rexnet_100": ("features.10", "1 x LinearBottleneck after features.15"),
    "xcit_nano_12_p8_224": ("blocks.7", "1 x XCABlock after blocks.11"),
    "dla46x_c": ("level4", "1 x DlaBottleneck after level5.tree2"),
    "torchvision/squeezenet1_1": ("features.8", "1 x Fire after features.12"),
    "torchvision/shufflenet_v2_x0_5": ("stage3", "1 x InvertedResidual after stage4.3"),
}


@pytest.mark.parametrize("name", FAST)
def test_networks_of_every_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "NARROWING_SECONDS", 2)  # two of them take all that there is
    row = trial.examine(name, img_size=64)
    assert (row["outcome"], row["reason"]) == ("ok", "")
    assert (row["shared"], row["trains"], row["strip"], row["own_blocks"]) == ("exact", "yes", "exact", "yes")
    assert (row["cut"], row["grown"]) == FAST[name]
    assert row["narrowed"], "it is narrower, or the reason is said"
    assert row["tail_flops"] >= 0.05 and set(row) <= set(trial.COLUMNS)


def test_a_handler_that_is_not_pythons_is_given_up_after_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append(handler))  # returns None, as then
    with trial._limited(60):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert handlers[1:] == [signal.SIG_DFL] and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_compile_and_onnx_columns() -> None:
    row = trial.examine("test_resnet", img_size=32, compiles=True, onnx=True)
    assert row["compile_breaks"] == 0 and row["onnx_difference"] < 1e-5


def test_a_network_that_does_not_take_the_size_is_given_its_own() -> None:
    assert trial.examine("torchvision/alexnet", img_size=8)["input"] == "3x224x224"


def test_a_network_of_torchvision_says_what_size_it_was_built_for() -> None:
    network = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=4)
    settings = NetworkSettings(model="torchvision/vit_h_14")  # whose pre-trained weights are for 518 pixels
    assert networks.data_config(network, settings)["input_size"] == (3, 32, 32)


def test_a_sweep_keeps_limits_and_goes_on(tmp_path: Path) -> None:
    table = tmp_path / "zoo.csv"
    told: list[str] = []

    def sweep(*names: str, img_size: int | None = 32, **options: Any) -> list[dict[str, str]]:
        told.clear()
        return zoo.sweep(names, table, img_size=img_size, done=lambda row: told.append(row["network"]), **options)

    for _ in range(2):
        assert sweep("test_vit", limits=NO_TIME)[0]["outcome"] == "time"
    assert told == [], "it would be stopped again"
    for _ in range(2):
        assert sweep("test_vit2", limits=zoo.Budget(gigabytes=0.001))[0]["outcome"] == "memory"
    assert told == []
    rows = sweep("test_vit", "resnet18_that_is_not")
    assert told == ["test_vit", "resnet18_that_is_not"], "what was stopped has a higher limit now"
    assert [row["outcome"] for row in rows] == ["ok", "refused"]
    assert "no network 'resnet18_that_is_not'" in rows[1]["reason"]
    assert [row["network"] for row in zoo.read(table)] == ["test_vit", "test_vit2", "resnet18_that_is_not"]
    assert dict(zoo.summary(rows))["shared exactly, eval and train mode"] == 1
    words = table.with_suffix(".md").read_text()
    assert "| networks | 2 |" in words and "- resnet18_that_is_not: refused: no network 'NAME'" in words
    sweep("test_vit", "resnet18_that_is_not")
    assert told == []
    sweep("test_vit", "resnet18_that_is_not", onnx=True, limits=NO_TIME)
    assert told == ["test_vit"], "it was not exported before"
    with pytest.raises(RunError, match=r"was made with --img-size 32, this sweep has no --img-size: .*--output"):
        sweep("test_vit", img_size=None)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="is no table of okdc inspect --all"):
        zoo.read(table)


def test_the_command(tmp_path: Path) -> None:
    table = str(tmp_path / "table.csv")
    result = CliRunner().invoke(
        main, ["inspect", "--all", "--filter", "test_vit", "--img-size", "64", "--output", table]
    )
    assert result.exit_code == 0, result.output
    assert "1 x Block after blocks.5" in result.output and "grown by its own blocks" in result.output
    assert Path(table).with_suffix(".md").is_file()
    assert CliRunner().invoke(main, ["inspect", "--all", "--families", "--sample", "3"]).exit_code == 2
    assert CliRunner().invoke(main, ["inspect"]).exit_code == 2
    assert CliRunner().invoke(main, ["inspect", "resnet18", "--all"]).exit_code == 2


def test_a_network_that_is_too_large_is_not_even_made(tmp_path: Path) -> None:
    rows = zoo.sweep(["vit_giant_patch14_clip_224"], tmp_path / "zoo.csv", limits=zoo.Budget(gigabytes=3.0))
    assert rows[0]["outcome"] == "memory"
    assert rows[0]["reason"].startswith("too large for the limit: 3 copies of its weights take 12 GB")
    assert trial.least_gigabytes("resnet18") == pytest.approx(3 * 4 * 11.689512e6 / 1e9)
    assert trial.least_gigabytes("torchvision/resnet18") == trial.least_gigabytes("resnet18")
    assert trial.least_gigabytes("resnet18_that_is_not") == 0


def test_a_sample_is_always_the_same_and_leaves_the_families_out() -> None:
    names = zoo.choose(sample=200)
    assert len(set(names)) == 200 and names == zoo.choose(sample=200)
    assert not set(names) & set(zoo.choose(families=True)) and all(timm.is_model(name) for name in names)
    assert zoo.choose(sample=100) == names[:100], "a larger sample goes on with a smaller one"


def test_names() -> None:
    families = zoo.choose(families=True)
    assert [trial.family(name) for name in families] == [m for m in timm.list_modules() if m != "cifar"], (
        "one network of every family"
    )
    assert zoo.choose("torchvision/resnet1*") == [f"torchvision/resnet{n}" for n in (101, 152, 18)]
    with pytest.raises(NetworkError, match="no network matches 'resnet18x'"):
        zoo.choose("resnet18x")


@pytest.mark.parametrize(
    ("table", "count", "least"), [("families", 98, 97), ("torchvision", 80, 79), ("sample", 200, 196)]
)
def test_the_tables_that_are_kept(table: str, count: int, least: int) -> None:
    rows = zoo.read(TABLES / f"{table}.csv")
    assert len({row["network"] for row in rows}) == len(rows) == count
    for column, good in [("shared", "exact"), ("strip", "exact"), ("trains", "yes")]:
        assert sum(row[column] == good for row in rows) >= least, column
    assert sum(bool(row["grown"]) for row in rows) >= least
    assert all(float(row["tail_flops"]) >= 0.05 for row in rows if row["tail_flops"])
    assert all(row["reason"] for row in rows if row["outcome"] != "ok")


def sizes_differ(name: str) -> bool:
    """Whether the stages that okdc finds are of other sizes than those that timm lists."""
    network, shape = trial._build(name, 64)
    found = {stage.size for stage in inspect(network, shape).stages}
    listed = {math.prod(math.ceil(n / each["reduction"]) for n in shape[1:]) for each in network.feature_info}
    pairs = [(found, listed), (listed, found)]
    return not all(any(same_size(size, other) for other in theirs) for ours, theirs in pairs for size in ours)


def recorded() -> set[str]:
    """The networks of the first table of stages.md."""
    table = (TABLES / "stages.md").read_text(encoding="utf-8").partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    assert all(why.strip() for _, _, _, _, why, _ in rows)
    return {name.strip() for _, names, *_ in rows[2:] for name in names.split(",")}


@pytest.mark.parametrize("name", ["regnetx_002", "test_resnet", "test_vit", "ghostnet_050"])
def test_stages_of_other_sizes_than_timms_are_recorded(name: str) -> None:
    assert sizes_differ(name) == (name in recorded())


@pytest.mark.zoo
def test_the_record_of_stages() -> None:
    names = [name for name in zoo.choose(families=True) if trial.least_gigabytes(name) < 4]
    assert {name for name in names if sizes_differ(name)} == recorded()


@pytest.mark.zoo
@pytest.mark.parametrize(("families", "pattern", "failures"), [(True, None, 1), (False, "torchvision/*", 1)])
def test_sweep(families: bool, pattern: str | None, failures: int, tmp_path: Path) -> None:
    rows = zoo.sweep(zoo.choose(pattern, families), tmp_path / "zoo.csv", img_size=64)
    failed = {row["network"]: row["reason"] for row in rows if row["outcome"] != "ok"}
    assert len(failed) <= failures, failed
