"""What a person sees of a training run: a bar on a terminal, lines elsewhere, and summary.csv."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import sys
import textwrap
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from okdc import tasks
from okdc.recipe import LOADER
from okdc.system import saying
from okdc.system.files import atomically
from okdc.system.saying import record, say
from okdc.tasks.task import Task

Row = dict[str, Any]

SECONDS_BETWEEN_DRAWINGS = 0.2
ENOUGH_STEPS, ENOUGH_SECONDS = 20, 20.0  # whichever comes first, to say how long the run takes, and its memory
LONG_RUN = 60.0  # seconds; a shorter one does not say so
LONG_WAIT = 10  # per cent of a step, spent waiting for data


class Display:
    """Shows a run of `epochs` times `steps` on stderr, unless `quiet`; a context manager, for the terminal's sake."""

    def __init__(
        self,
        epochs: int,
        steps: int,
        log_interval: int,
        advice: str = "",
        quiet: bool = False,
        task: Task | None = None,
        outputs: int | None = None,
    ) -> None:
        self.goal = task or tasks.get()
        self.shown = self.goal.shown(outputs)
        self.advice = advice  # for whoever waits for data for long; given once
        self.quiet = quiet
        self.epochs, self.steps, self.log_interval = epochs, steps, max(1, log_interval)
        self.console = Console(stderr=True)
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), auto_refresh=False)
        self.task = self.bar.add_task("", total=steps)
        self.status, self.accuracies = "", ""
        self.drawn, self.seen = 0.0, 0
        self.began: float | None = None  # until the time left was told: when the first step was done
        drawable = self.console.is_terminal and not self.console.is_dumb_terminal
        bar = not quiet and not saying.quiet and (_in_notebook(self.console) or drawable)
        # Drawn by step() and not by a thread, whose lock a data worker could inherit held when it is forked.
        self.live = Live(console=self.console, auto_refresh=False, get_renderable=self._render) if bar else None

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def note(self, text: str, always: bool = False) -> None:
        """Say something once, above the bar; `always`: also to whoever wants no progress (-q)."""
        if self.live:
            self.console.print(Text(text), soft_wrap=True)  # a command in it can be copied
            record(text)
        elif not self.quiet:
            say(text, always)

    def step(self, epoch: int, step: int, losses: Mapping[str, float], lr: float, speed: float, left: float) -> None:
        """Step `step` of epoch `epoch` is done, at `speed` images per second, with `left` seconds to the end of the
        run; no `losses` when it was skipped."""
        self.seen += 1
        now = time.perf_counter()
        self._forecast(now, left)
        if now < self.drawn + SECONDS_BETWEEN_DRAWINGS if self.live else step % self.log_interval:
            return
        self.drawn = now
        loss = f"loss {sum(losses.values()):.4g}" if losses else "step skipped, not finite"
        parts = " ".join(f"{name} {value:.4g}" for name, value in losses.items())
        # The parts last: they are what a narrow terminal may cut off.
        # A first step, which may compile, says nothing of others.
        remaining = f"{timedelta(seconds=round(left))} left · " * (self.seen > 1)
        self.status = f"{loss} · lr {lr:.3g} · {speed:.0f} images/s · {remaining}{parts}"
        if self.live:
            self.bar.update(self.task, description=f"epoch {epoch + 1}/{self.epochs}", completed=step)
            self.live.refresh()
        else:
            self.note(f"epoch {epoch + 1}/{self.epochs} step {step}/{self.steps} {self.status}")

    def _forecast(self, now: float, left: float) -> None:
        """Say once how long a long run takes, as soon as its steps tell: not by the first one, which may compile."""
        if self.seen == 1:
            self.began = now
        elif self.began is not None and (
            self.seen >= min(ENOUGH_STEPS, self.steps + 1) or now - self.began > ENOUGH_SECONDS
        ):
            self.began = None
            if left > LONG_RUN:
                self.note(f"About {timedelta(seconds=round(left))} to go, by the first {self.seen} steps{_memory()}")

    def epoch(self, row: Row) -> None:
        """An epoch is over; `row` is its line of the history."""
        metric, of = self.goal.metric, f"{self.goal.metric}/"
        members = {name.removeprefix(of): value for name, value in row.items() if name.startswith(of)}
        if len(members) == 2:  # the target's is the ensemble's
            del members["ensemble"]
        self.accuracies = _told(members)
        line = f"epoch {row['epoch'] + 1}/{self.epochs}: loss {row['train_loss']:.4f}"
        if row[f"eval_{metric}"] is not None:
            each = [f"{each.short or each.word} {row[f'eval_{name}']:.3f}" for name, each in self.shown.items()]
            others = {
                name: value for name, value in members.items() if (name, value) != ("target", row[f"eval_{metric}"])
            }
            line += f" · {' '.join(each)}" + (f" · {self.goal.word} of {_told(others)}" if others else "")
        if row["skipped_steps"]:
            line += f" · {row['skipped_steps']} steps skipped"
        self.note(self._folded(f"{line} · {row['seconds']:.1f} s · data wait {row['data_wait']:.0f} %"))
        if row["data_wait"] > LONG_WAIT and self.advice:
            self.note(f"The steps waited for data for {row['data_wait']:.0f} % of their time. {self.advice}")
            self.advice = ""

    def _folded(self, line: str) -> str:
        """The line as it is in a log; on a terminal that is narrower it goes on below, between two figures."""
        if not self.console.is_terminal:
            return line
        whole = line.replace(" ", "\0").replace("\0·\0", "\0· ")  # a line ends behind a dot alone
        return textwrap.fill(whole, self.console.width, subsequent_indent="  ").replace("\0", " ")

    def _render(self) -> Group:
        accuracies = f"{self.goal.word}: {self.accuracies}" if self.accuracies else ""
        return Group(self.bar, Text(self.status, overflow="ellipsis", no_wrap=True), Text(accuracies))


def _in_notebook(console: Console) -> bool:
    """Whether this is a notebook that can draw anew in its place."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


def _told(figures: Mapping[str, float | None]) -> str:
    return " ".join(f"{name} {value:.2f}" for name, value in figures.items() if value is not None)


def _memory() -> str:
    """What training takes so far: of the GPU where it has begun on one, else of the process; nothing on Windows."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"; {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory so far"
    try:
        import resource
    except ImportError:
        return ""
    unit = 1 if sys.platform == "darwin" else 2**10
    return f"; {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory so far"


def faster_data(recipe: dict[str, Any], resident: bool = False) -> str:
    """What to type when a run with this recipe waits for its data, which may be kept decoded already."""
    data, cores = recipe.get("data", {}), os.cpu_count() or 1
    if data.get("data") == LOADER:
        return "Let your loader do its work in processes (num_workers=N), or do less for each image."
    if resident:
        return "The images are kept decoded already: augment them less (--reprob, --mixup), or take more at once (-b)."
    if data.get("resident") == "off":
        return "Let small images be kept decoded: --resident auto."
    if (workers := data.get("workers", 0)) < cores:
        return f"Try more data loading processes: -j {min(cores, max(2, 2 * workers))}."
    return (
        f"All {cores} cores load data already: keep the images decoded (--resident on says what is in its way), store "
        "them smaller, or augment them less (--aa, --reprob)."
    )


def write_summary(path: Path, history: list[Row]) -> None:
    """Write the whole history as CSV, atomically: one header, one line per epoch, timm's columns first."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))
