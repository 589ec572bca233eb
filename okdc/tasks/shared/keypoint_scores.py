"""How good predicted key points are: PCK, mean error, OKS and its average precision; how many stay where they were.

N instances, K key points. Points are (N, K, 2 or more), x and y in pixels of the source; true ones (N, K, 3) with a
weight that is 0 where there is no label. What is counted are sums, which add up over batches and processes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from okdc.errors import DataError

THRESHOLDS = (0.05, 0.1, 0.2)  # of PCK, as shares of a length that comes with each instance


def distances(predicted: Tensor, true: Tensor) -> Tensor:
    """How far each point is from where it should be, (N, K), in the points' own pixels."""
    return (predicted[..., :2].double() - true[..., :2].double()).norm(dim=-1)


def oks(predicted: Tensor, true: Tensor, areas: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Object key-point similarity (N,), the mean of exp(-d^2 / (2 area (2 sigma)^2)) over labelled points.

    Areas (N,) in square pixels. NaN for an instance without a labelled point.
    """
    spread = 2 * areas.double()[:, None] * (2 * torch.as_tensor(sigmas, dtype=torch.float64, device=areas.device)) ** 2
    labelled = (true[..., 2] > 0).double()
    return (labelled * torch.exp(-(distances(predicted, true) ** 2) / spread)).sum(1) / labelled.sum(1)


class KeypointScore:
    """PCK and mean error of what it was shown.

    `sums` (K, 5) hold of each key point how many are labelled, their errors in pixels, and how many are right at each
    threshold. `squares` (7,) are sums over instances: the square of their labelled points, at each threshold the square
    of right ones, then their products with labelled ones. Both are float64 and add up over processes.
    """

    def __init__(self, keypoints: int) -> None:
        self.sums = torch.zeros(keypoints, 2 + len(THRESHOLDS), dtype=torch.float64)
        self.squares = torch.zeros(1 + 2 * len(THRESHOLDS), dtype=torch.float64)

    def update(self, predicted: Tensor, true: Tensor, lengths: Tensor) -> None:
        """Count instances; `lengths` (N,), in the points' pixels, are what the thresholds are shares of."""
        off, labelled = distances(predicted, true).cpu(), (true[..., 2] > 0).cpu()
        right = [labelled & (off <= share * lengths.double().cpu()[:, None]) for share in THRESHOLDS]
        each = torch.stack([labelled.double(), torch.where(labelled, off, 0.0), *(r.double() for r in right)], -1)
        self.sums += each.sum(0)
        count, hits = each[..., 0].sum(1), each[..., 2:].sum(1).T
        self.squares += torch.cat([(count**2).sum()[None], (hits**2).sum(1), (hits * count).sum(1)])

    @staticmethod
    def of(packed: Tensor) -> KeypointScore:
        """From what `packed` gave, or from the sum of several."""
        score = KeypointScore(len(packed) - 1)
        score.sums, score.squares = packed[:-1, : score.sums.shape[1]], packed[-1]
        return score

    def packed(self) -> Tensor:
        """All sums in one tensor (K + 1, 7): a row for each key point, then the squares."""
        return torch.cat([F.pad(self.sums, (0, len(self.squares) - self.sums.shape[1])), self.squares[None]])

    def value(self) -> dict[str, float]:
        """`pck@0.1` and its like in per cent of all labelled points, `error` in pixels, `points`, how many they are.

        `margin@0.1` is half of a 95 % interval, points. The points of one instance are right and wrong together, so
        instances are what is drawn by chance; of neighbouring frames of a film the true margin is wider still.
        """
        total = self.sums.sum(0)
        points = float(total[0])
        found = {"points": points, "error": float(total[1]) / points if points else float("nan")}
        squares, products = self.squares[1:].view(2, -1)
        for i, share in enumerate(THRESHOLDS):
            rate = float(total[2 + i]) / points if points else float("nan")
            spread = float(squares[i] - 2 * rate * products[i] + rate**2 * self.squares[0])
            found[f"pck@{share}"] = 100 * rate
            found[f"margin@{share}"] = 100 * 1.96 * max(spread, 0.0) ** 0.5 / points if points else float("nan")
        return found

    def each(self, share: float = 0.1) -> list[float]:
        """PCK of every key point (K,) at one of the thresholds, per cent; NaN for one without labels."""
        return (100 * self.sums[:, 2 + THRESHOLDS.index(share)] / self.sums[:, 0]).tolist()


def moved(points: Tensor, reference: Tensor, stride: tuple[float, float], least: float = 0.5) -> Tensor:
    """Which points (N, K) are `least` pixels of the heat map or more from the reference's; points in input pixels."""
    down, across = stride
    return (points[..., :2] - reference[..., :2]).div(points.new_tensor([across, down])).norm(dim=-1) >= least


def has_coco() -> bool:
    """Whether pycocotools is installed."""
    return importlib.util.find_spec("pycocotools") is not None


def average_precision(
    predicted: Tensor, true: Tensor, areas: Tensor, images: Sequence[int], sigmas: Sequence[float]
) -> dict[str, float]:
    """COCO's OKS-AP, per cent: `AP`, `AP50`, `AP75` and `AR`, by pycocotools; DataError where that is not installed.

    Predicted points (N, K, 3) have scores, whose mean is the instance's; `images` (N,) say who is in one picture.
    Boxes are given, so each instance has one prediction, and AP asks how exact points are and how well scores order
    them. Instances without a labelled point are left out, on both sides; NaN where nothing is left.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise DataError("OKS-AP needs pycocotools, which is not installed: pip install 'okdc[pose]'") from error
    kept = (true[..., 2] > 0).any(1).nonzero().flatten().tolist()
    if not kept:
        return dict.fromkeys(("AP", "AP50", "AP75", "AR"), float("nan"))
    pictures = [images[i] for i in kept]
    truth, given = COCO(), COCO()
    for side, points in ((truth, true), (given, predicted)):
        side.dataset = {
            "images": [{"id": image} for image in dict.fromkeys(pictures)],
            "categories": [{"id": 1, "name": "instance"}],
            "annotations": _annotations(points[kept], areas[kept], pictures),
        }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth.createIndex(), given.createIndex()
        judge: Any = COCOeval(truth, given, "keypoints")
        judge.params.kpt_oks_sigmas = np.asarray(sigmas)
        judge.evaluate(), judge.accumulate(), judge.summarize()
    return {name: 100 * float(judge.stats[i]) for name, i in (("AP", 0), ("AP50", 1), ("AP75", 2), ("AR", 5))}


def _annotations(points: Tensor, areas: Tensor, images: Sequence[int]) -> list[dict[str, Any]]:
    """Instances (N, K, 3) as COCO writes labels and results; a point of any weight is a visible one."""
    found = []
    for number, (each, area, image) in enumerate(zip(points.double().cpu().numpy(), areas.tolist(), images), 1):
        low, high, visible = each[:, :2].min(0), each[:, :2].max(0), each[:, 2] > 0
        found.append({
            "id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "area": area,
            "bbox": [*low, *(high - low)], "num_keypoints": int(visible.sum()), "score": float(each[:, 2].mean()),
            "keypoints": np.column_stack([each[:, :2], 2 * visible]).ravel().tolist(),
        })  # fmt: skip
    return found
