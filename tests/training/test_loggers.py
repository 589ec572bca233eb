"""--log: every epoch once, with summary.csv's names and numbers, also when a run is cut and goes on."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tensorboard.summary.writer import event_file_writer

from okdc.cli import main
from okdc.errors import RecipeError
from okdc.recipe import resolve
from okdc.training import loggers
from okdc.training.loggers import Loggers
from tests.helpers.training import Crash, crash_at, run, tiny_data

Points = dict[str, dict[int, float]]  # name -> step -> value
RECIPE = {"train": {"epochs": 3, "lr": 0.05}, "network": {"model": "tiny"}, **{f"s{i}": {"x": i} for i in range(150)}}


def points(told: list[tuple[str, int, float]]) -> Points:
    """What was told, none of it twice."""
    assert len({(name, step) for name, step, _ in told}) == len(told)
    found: Points = {}
    for name, step, value in told:
        found.setdefault(name, {})[step] = value
    return found


def tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return points([(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)])


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    client = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed").MlflowClient()
    experiment = client.get_experiment_by_name("okdc")
    found = client.search_runs([experiment.experiment_id], f"tags.mlflow.runName = '{folder.name}'")
    assert len(found) == 1
    return client, found[0]


def mlflow(folder: Path) -> Points:
    client, told = mlflow_run(folder)
    history = [m for name in told.data.metrics for m in client.get_metric_history(told.info.run_id, name)]
    return points([(m.key, m.step, m.value) for m in history])


def wandb_records(folder: Path) -> list[tuple[str, Any]]:
    """The kind and content of the newest offline run's records, once wandb's own process has written the last."""
    newest = max(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    until = time.monotonic() + 20
    while not (found := wandb_file(newest)) or found[-1][0] != "exit":
        assert time.monotonic() < until, found
        time.sleep(0.02)
    return found


def wandb_file(path: Path) -> list[tuple[str, Any]]:
    """Records in the format of LevelDB's logs (blocks of 32 KiB) behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, place, records, data = path.read_bytes(), 7, [], b""
    while place + 7 <= len(raw):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        data += raw[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, data = Record.FromString(data), b""
            told = record.WhichOneof("record_type")
            records.append((told, getattr(record, told)))
    return records


def wandb(folder: Path) -> Points:
    rows = []
    for kind, record in wandb_records(folder):
        if kind == "history":
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.item}
            rows += [(name, row["_step"], float(value)) for name, value in row.items() if name[0] != "_"]
    return points(rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


READERS: dict[str, Callable[[Path], Points]] = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves the machine, nor the folder of the test."""
    given = {
        "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "WANDB_PROJECT": "",
        "WANDB_CACHE_DIR": str(tmp_path / "cache"), "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "MLFLOW_TRACKING_URI": (tmp_path / "mlflow").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_PROJECT")
    # TensorBoard sorts files of one second by the writer's number in the process, as text: the tenth before the ninth.
    monkeypatch.setattr(event_file_writer, "_global_uid", type(event_file_writer._global_uid)(0))


@pytest.fixture(params=list(READERS))
def name(request: pytest.FixtureRequest) -> str:
    if request.param != "tensorboard":
        pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


def expected(history: list[dict[str, Any]]) -> Points:
    rows = [(name, row["epoch"], value) for row in history for name, value in row.items() if value is not None]
    return points(rows)


def assert_told(told: Points, history: list[dict[str, Any]]) -> None:
    wanted = expected(history)
    assert {key for key in told if not key.startswith("final/")} == wanted.keys()
    for key, values in wanted.items():
        assert told[key] == pytest.approx(values, rel=1e-6, nan_ok=True)


def test_every_epoch_of_a_run_that_is_cut_and_goes_on_is_told_once(name: str, folder: Path) -> None:
    with pytest.raises(Crash), Loggers([name], folder, RECIPE) as logs:
        run(folder, data=tiny_data(crash_at(2, 3)), loggers=logs)
    assert len(READERS[name](folder)["loss/ce"]) == 2
    with Loggers([name], folder, RECIPE) as logs:
        state = run(folder, resume=folder / "last.pth.tar", loggers=logs)
        logs.end({"top1": 75.0, "eval_metric": "top1", "top5": None}, "pass")
    told = READERS[name](folder)
    assert_told(told, state.history)
    assert len(told["loss/ce"]) == 3 and "final/top5" not in told
    if name != "wandb":
        assert told["final/top1"] == {0: 75.0}
    assert (folder / loggers.IDS).is_file() == (name != "tensorboard")


def test_what_a_kill_kept_from_a_logger_is_told_and_what_it_has_is_not_told_again(name: str, folder: Path) -> None:
    rows = [{"epoch": i, "train_loss": math.nan if i == 1 else 1.5 * i, "eval_top1": None} for i in range(5)]

    def go_on(done: int, until: int) -> None:
        with Loggers([name], folder, RECIPE) as logs:
            logs.begin(rows[:done])
            for row in rows[done:until]:
                logs.epoch(row)
        READERS[name](folder)  # which waits for wandb's own process

    go_on(0, 2)
    go_on(3, 4)  # killed when the third epoch was saved and not told yet
    go_on(2, 5)  # the last checkpoints were lost
    assert_told(READERS[name](folder), rows)


def test_mlflow_has_the_settings_and_what_came_of_the_run(folder: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    with Loggers(["mlflow"], folder, RECIPE) as logs:
        logs.begin([])
        logs.end({"top1": 75.0, "eval_metric": "top1"}, "pass")
    _, told = mlflow_run(folder)
    assert told.data.params["train.lr"] == "0.05" and told.data.params["s149.x"] == "149"
    assert told.data.tags["verification"] == "pass" and told.data.tags["final/eval_metric"] == "top1"
    assert told.info.status == "FINISHED"
    with pytest.raises(Crash), Loggers(["mlflow"], folder, RECIPE) as logs:
        logs.begin([])
        raise Crash
    assert mlflow_run(folder)[1].info.status == "FAILED"


def test_wandb_has_the_settings_and_what_came_of_the_run(folder: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    with Loggers(["wandb"], folder, RECIPE) as logs:
        logs.begin([])
        logs.end({"top1": 75.0}, "pass")
    records = wandb_records(folder)
    (begun,) = [record for kind, record in records if kind == "run"]
    assert (begun.project, begun.display_name) == ("okdc", "mine")
    assert begun.run_id == json.loads((folder / loggers.IDS).read_text())["wandb"]
    assert {item.key: json.loads(item.value_json) for item in begun.config.update}["train"] == RECIPE["train"]
    summary = [item for kind, record in records if kind == "summary" for item in record.update]
    told = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in summary}
    assert told["final/top1"] == 75 and told["verification"] == "pass"


def test_a_logger_that_fails_costs_no_training_and_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")

    def lose(epoch: int, index: int) -> None:
        if (epoch, index) == (1, 0):
            shutil.rmtree(tmp_path / "mlflow")

    with Loggers(["mlflow", "tensorboard"], tmp_path / "run", RECIPE) as logs:
        state = run(tmp_path / "run", data=tiny_data(lose), loggers=logs)
        logs.end({"top1": 1.0}, None)
    assert state.epoch == 3
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1 and said[0].startswith("mlflow failed (") and "The run goes on without it" in said[0]
    assert_told(tensorboard(tmp_path / "run"), state.history)


def test_what_is_not_installed_or_not_known_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"log: expected one of tensorboard, wandb, mlflow, got 'wandbb'"):
        resolve(flat={"log": ["tensorboard", "wandbb"]})
    assert loggers.chosen([]) == [] and loggers.chosen(["tensorboard"] * 2) == ["tensorboard"]
    (tmp_path / "wandb").mkdir()  # as wandb itself leaves where it is called: no package
    for hidden in ("wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, hidden, raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert loggers.chosen(None) == []
    with pytest.raises(RecipeError, match=r"--log wandb: not installed here\. pip install wandb, or leave it out"):
        loggers.chosen(["wandb"])


def test_a_run_of_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    words = "compress --model resnet20_cifar --method baseline --data digits --img-size 8 --epochs 1 -b 400 -j 0 "
    words += "--device cpu --no-onnx --log tensorboard,mlflow --log-wandb --experiment mine --output"
    result = CliRunner().invoke(main, [*words.split(), str(tmp_path)])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "mine"
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["train"]["log"] == ["tensorboard", "mlflow", "wandb"]
    report = json.loads((folder / "report.json").read_text())
    for read in READERS.values():
        assert_told(read(folder), report["history"])
    assert mlflow(folder)["final/top1"] == {0: report["metrics"]["top1"]}
