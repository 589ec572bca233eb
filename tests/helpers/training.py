"""A small network, method and data whose training takes a tenth of a second, and what tests ask of such runs."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.methods import Method
from okdc.recipe import TrainSettings
from okdc.training import TrainState, fit

CLASSES, BATCH, STEPS = 3, 8, 6
SETTINGS = TrainSettings(epochs=3, batch_size=BATCH, lr=0.05, device="cpu", log_interval=100)


def network(width: int = 4, norm: bool = True, drop: float = 0.3) -> nn.Module:
    middle = nn.BatchNorm2d(width) if norm else nn.Identity()
    return nn.Sequential(
        nn.Conv2d(3, width, 3), middle, nn.ReLU(), nn.Dropout(drop), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )  # fmt: skip


class Tiny(Method):
    """Branches that learn from the labels and from the target, with a memory in a buffer and one in extra state."""

    def __init__(self, target: nn.Module | None = None, width: int = 4, norm: bool = True, drop: float = 0.3) -> None:
        torch.manual_seed(0)
        branches = [] if target else [Branch("1" if norm else "0"), Branch(network=network(5, norm, drop))]
        super().__init__(Cohort(target or network(width, norm, drop), torch.randn(2, 3, 8, 8), branches))
        self.register_buffer("memory", torch.zeros(()))
        self.steps_seen = 0

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        ours, *theirs = out.logits
        self.memory.lerp_(ours.detach().float().mean(), 0.1)
        parts = [F.kl_div(z.log_softmax(1), ours.softmax(1).detach(), reduction="batchmean") for z in theirs]
        kl = torch.stack([self.memory * 0, *parts]).sum()
        ce = torch.stack([F.cross_entropy(z, labels) for z in out.logits]).sum()
        return {"ce": ce, "kl": kl * (1 + self.epoch / self.epochs)}

    def after_step(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        self.steps_seen += 1

    def get_extra_state(self) -> dict:
        return {"steps_seen": self.steps_seen}

    def set_extra_state(self, state: dict) -> None:
        self.steps_seen = state["steps_seen"]


class Batches:
    """Training batches in an order that is a function of the epoch; `before` is called with (epoch, index) of each."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int = BATCH, before=lambda epoch, index: None) -> None:
        self.images, self.labels, self.batch, self.before = images, labels, batch, before

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def batches(self, epoch: int, start: int = 0):
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch)).split(self.batch)
        for index, chosen in enumerate(order[start : len(self)], start):
            self.before(epoch, index)
            yield self.images[chosen], self.labels[chosen]


def tiny_data(before=lambda epoch, index: None, batch: int = BATCH, validation: bool = True) -> SimpleNamespace:
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(BATCH * STEPS) % CLASSES
    images = 4 * torch.randn(len(labels), 3, 8, 8, generator=draw) + labels.view(-1, 1, 1, 1)
    train = Batches(images, labels, batch, before)
    judged = [(images[:20], labels[:20]), (images[20:27], labels[20:27])] * validation
    return SimpleNamespace(train=train, validation=judged, held_out=None)


def run(folder: Path, settings: TrainSettings = SETTINGS, *, method=None, data=None, **options) -> TrainState:
    options = {"arch": "tiny", "recipe": {"train": {"epochs": settings.epochs}}} | options
    return fit(method or Tiny(), data or tiny_data(), settings, folder, **options)


def same(one, other) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


TIMES = ("seconds", "images_per_second", "data_wait")


def assert_same_run(one: TrainState, other: TrainState, folder: Path, other_folder: Path) -> None:
    expected, found = one.method.state_dict(), other.method.state_dict()
    assert expected.keys() == found.keys()
    assert [k for k in expected if not same(expected[k], found[k])] == []
    ours, theirs = one.student.state_dict(), other.student.state_dict()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert one.scaler.state_dict() == other.scaler.state_dict()
    assert summary(folder) == summary(other_folder)
    assert (one.best, one.best_epoch) == (other.best, other.best_epoch)


class Crash(Exception):
    pass


def crash_at(epoch: int, index: int):
    def before(*position: int) -> None:
        if position == (epoch, index):
            raise Crash

    return before
