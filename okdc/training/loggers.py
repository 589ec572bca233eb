"""Who is told of a run beside summary.csv, by `--log`: TensorBoard, Weights & Biases, MLflow, each by its own package.

Each has the run's settings, every epoch once at the step of its number, and what came of the run. None is a reason for
a run to fail: one that does is left out from then on, which is said once, and told what it missed by `--resume`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from okdc.errors import RecipeError
from okdc.system.files import atomically
from okdc.system.waiting import worker_died

log = logging.getLogger("okdc")

IDS = "loggers.json"  # under which run each logger knows this one, so that it goes on there
Row = dict[str, Any]


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, folder: Path, settings: dict[str, Any], id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop what earlier files have from step 0 on: all of it is written again.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=0)
        self.id, self.epochs = None, 0
        self.writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in _flat(settings).items()))

    def epoch(self, row: Row) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()

    def end(self, facts: Row) -> None:
        for name, value in facts.items():
            (self.writer.add_text if isinstance(value, str) else self.writer.add_scalar)(name, value)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, in the project WANDB_PROJECT or `okdc`; offline ones are begun anew when resumed."""

    def __init__(self, folder: Path, settings: dict[str, Any], id: str | None) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "okdc"), name=folder.name, dir=str(folder), config=settings,
            id=id, resume="allow" if id else None, reinit="create_new", settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self.id, self.epochs = self.run.id, self.run.starting_step

    def epoch(self, row: Row) -> None:
        self.run.log(row, step=row["epoch"], commit=True)

    def end(self, facts: Row) -> None:
        self.run.summary.update(facts)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME or `okdc`."""

    def __init__(self, folder: Path, settings: dict[str, Any], id: str | None) -> None:
        # Its own patience with a server that does not answer is a quarter of an hour, in which a run would stand still.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient

        self.client = MlflowClient()
        self.id = id or self._begin(folder.name, settings)
        self.client.update_run(self.id, "RUNNING")
        known = self.client.get_metric_history(self.id, "epoch")
        self.epochs = max((metric.step + 1 for metric in known), default=0)

    def _begin(self, name: str, settings: dict[str, Any]) -> str:
        from mlflow.entities import Param

        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "okdc")
        found = self.client.get_experiment_by_name(title)
        experiment = found.experiment_id if found else self.client.create_experiment(title)
        id = self.client.create_run(experiment, run_name=name).info.run_id
        params = [Param(key, str(value)) for key, value in _flat(settings).items()]
        for start in range(0, len(params), 100):  # more it does not take at once
            self.client.log_batch(id, params=params[start : start + 100])
        return id

    def epoch(self, row: Row) -> None:
        self._metrics(row, row["epoch"])

    def _metrics(self, values: Row, step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, [Metric(name, float(value), now, step) for name, value in values.items()])

    def end(self, facts: Row) -> None:
        self._metrics({name: value for name, value in facts.items() if not isinstance(value, str)}, 0)
        for name, value in facts.items():
            if isinstance(value, str):
                self.client.set_tag(self.id, name, value)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


KINDS: dict[str, Callable[..., Any]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def chosen(asked: Sequence[str] | None) -> list[str]:
    """The loggers that `--log` names, without it TensorBoard where that is installed; RecipeError for what is not."""
    if asked is None:
        return ["tensorboard"] if _installed("tensorboard") else []
    if missing := [name for name in asked if not _installed(name)]:
        raise RecipeError(
            f"--log {','.join(missing)}: not installed here. pip install {' '.join(missing)}, or leave it out: "
            "summary.csv has the same numbers."
        )
    return list(dict.fromkeys(asked))


def _installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name, such as wandb's own, is no package


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by section as `section.name`."""
    return {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}


class Loggers:
    """The loggers `names` of the run in `folder` with `settings` by section; a context manager, which closes them."""

    def __init__(self, names: Sequence[str], folder: Path, settings: dict[str, Any]) -> None:
        self.names, self.folder, self.settings = names, folder, settings
        self.running: dict[str, Any] = {}

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._each(lambda logger: logger.close(kind is not None))

    def begin(self, history: Sequence[Row]) -> None:
        """Open all, where they were if the run has been told to them before, and tell what they lack of `history`."""
        for name in self.names:
            self._guarded(name, self._open, name)
        for row in history:
            self.epoch(row)

    def _open(self, name: str) -> None:
        file = self.folder / IDS
        ids = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        logger = self.running[name] = KINDS[name](self.folder, self.settings, ids.get(name))
        if logger.id:
            text = json.dumps({**ids, name: logger.id}, indent=2) + "\n"
            atomically(file, lambda path: path.write_text(text, encoding="utf-8"))

    def epoch(self, row: Row) -> None:
        """A line of the history, unless one has it already: a run may go on from before the last that was told."""
        known = {name: value for name, value in row.items() if value is not None}
        self._each(lambda logger: logger.epoch(known) if row["epoch"] >= logger.epochs else None)

    def end(self, metrics: Row, verdict: str | None) -> None:
        """What came of the run: the figures of what ships, and how its files were judged."""
        facts = {f"final/{name}": value for name, value in metrics.items()} | {"verification": verdict}
        self._each(lambda logger: logger.end({name: value for name, value in facts.items() if value is not None}))

    def _each(self, act: Callable[[Any], object]) -> None:
        for name, logger in list(self.running.items()):
            self._guarded(name, act, logger)

    def _guarded(self, name: str, act: Callable[[Any], object], argument: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are for whoever writes a logger
                act(argument)
        except Exception as error:
            if worker_died(error):
                raise
            self.running.pop(name, None)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            log.warning(
                "%s failed (%s). The run goes on without it: summary.csv has every epoch, and --resume tells it those "
                "that it missed", name, reason,
            )  # fmt: skip
