"""How good the points of heat maps are: per epoch, and of an exported file. B batch, K key points.

Maps are decoded, and points taken back to the source, in whose pixels errors, lengths and areas are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from okdc.ranks import rank, world
from okdc.tasks.shared.keypoint_scores import KeypointScore, average_precision, has_coco, moved
from okdc.tasks.shared.maps import Maps
from okdc.tasks.shared.point_labels import COLUMNS, ORIGIN, with_origin
from okdc.tasks.shared.scorer import Scorer
from okdc.tasks.shared.tally import Tally

WIDTH = 2 * COLUMNS + ORIGIN  # of what is kept of a point: predicted, true, and where the image came from


def rows(out: Tensor, labels: Tensor, maps: Maps) -> Tensor:
    """Of maps (B, K, h, w) and labels: predicted and true points in pixels of the source, and the rest, (B, K, 10)."""
    labels = with_origin(labels, maps.input_size)
    scale = labels[..., COLUMNS, None]
    points, true = maps.decode(out), labels[..., :COLUMNS]
    sides = [torch.cat([each[..., :2] * scale, each[..., 2:]], -1) for each in (points, true)]
    return torch.cat([*sides, labels[..., COLUMNS:]], -1)


def scored(table: Tensor) -> KeypointScore:
    """PCK and mean error of rows (N, K, 10)."""
    score = KeypointScore(table.shape[1])
    score.update(table[..., :3], table[..., 3:6], table[:, 0, 7])
    return score


class PointScorer(Scorer):
    """PCK, mean error, OKS-AP where pycocotools is installed, and the loss; the student's rows are kept for these.

    Its counts (K + 1, 7) are those of `KeypointScore.packed`.
    """

    def __init__(self, maps: Maps, loss: Callable[[Tensor, Tensor], Tensor], keypoints: int, others: int) -> None:
        self.maps, self.supervised = maps, loss
        self.parts = [torch.zeros(0, keypoints, WIDTH)]
        self.sums = torch.zeros(1 + others, *KeypointScore(keypoints).packed().shape, dtype=torch.float64)
        self.loss = 0.0

    def update(self, student: Tensor, labels: Tensor, others: Sequence[Tensor] = ()) -> None:
        self.loss += len(labels) * float(self.supervised(student, labels))
        self.images += len(labels)
        each = [rows(out, labels, self.maps).float().cpu() for out in (student, *others)]
        self.parts.append(each[0])
        self.sums += torch.stack([scored(table).packed() for table in each])

    def add_up(self, add: Callable[[Tensor], Tensor]) -> None:
        """Each process puts its rows where those of the processes before it end; the sum is then all of them."""
        own = torch.zeros(world(), dtype=torch.float64)
        own[rank()] = self.images
        told = add(torch.cat([own, self.sums.flatten(), own.new_tensor([self.loss])]))
        counts = told[: world()].round().long()
        start, table = int(counts[: rank()].sum()), torch.cat(self.parts)
        whole = torch.zeros(int(counts.sum()), *table.shape[1:], dtype=torch.float64)
        whole[start : start + self.images] = table
        self.parts = [add(whole.flatten()).view_as(whole).float()] if len(whole) else self.parts
        self.sums, self.loss = told[world() : -1].view_as(self.sums), float(told[-1])
        self.images = int(counts.sum())

    def value(self) -> dict[str, float]:
        found = KeypointScore.of(self.sums[0]).value()
        told = {name: found[name] for name in ("pck@0.05", "pck@0.1", "pck@0.2", "error")}
        if has_coco():
            table = torch.cat(self.parts)
            areas, numbers = table[:, 0, 8], table[:, 0, 9].long().tolist()
            pictures = [number if number >= 0 else -1 - i for i, number in enumerate(numbers)]
            told["ap"] = average_precision(table[..., :3], table[..., 3:6], areas, pictures, self.maps.sigmas)["AP"]
        return {"loss": self.loss / self.images, **told}

    def others(self) -> list[float]:
        return [KeypointScore.of(sums).value()["pck@0.1"] for sums in self.sums[1:]]

    def counts(self) -> Tensor:
        return self.sums[0]


@dataclass
class PointTally(Tally):
    """PCK, and which points are less than half a pixel of the heat map from the reference's."""

    maps: Maps = field(default_factory=Maps)
    total: KeypointScore | None = None

    def same(self, out: np.ndarray, reference: np.ndarray) -> np.ndarray:
        ours, theirs = (self.maps.decode(torch.from_numpy(np.asarray(each)).float()) for each in (out, reference))
        return ~moved(ours, theirs, self.maps.stride(out.shape[2:])).numpy()

    def tied(self, out: np.ndarray, reference: np.ndarray, least: float) -> np.ndarray:
        """Where the reference's map is nearly as high at our peak as at its own."""
        ours, theirs = (each.reshape(*each.shape[:2], -1) for each in (out, reference))
        there = np.take_along_axis(theirs, ours.argmax(-1)[..., None], -1)[..., 0]
        return theirs.max(-1) - there < 2 * least

    def count(self, out: np.ndarray, labels: np.ndarray) -> None:
        found = scored(rows(torch.from_numpy(np.asarray(out)).float(), torch.from_numpy(labels).float(), self.maps))
        self.total = found if self.total is None else KeypointScore.of(self.total.packed() + found.packed())

    def scores(self) -> dict[str, float]:
        found = self.total.value() if self.total else {}
        return {name: found.get(name, float("nan")) for name in ("pck@0.1", "pck@0.05")}
