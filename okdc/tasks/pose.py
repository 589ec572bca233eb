"""Key points: a heat map for each, whose peak says where it is; labels are points in pixels of the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from okdc.tasks.shared import heatmaps
from okdc.tasks.shared.keypoint_scores import KeypointScore
from okdc.tasks.shared.maps import Maps
from okdc.tasks.shared.point_labels import checked_points
from okdc.tasks.shared.point_scores import PointScorer, PointTally
from okdc.tasks.task import MAPS, Metric, Task

_CLASSES = "an image has key points, and no class"
_PLACES = "key points would not move with the image, which --rotation, --zoom, --shift and --hflip move as a whole"


class Pose(Task):
    """Maps (B, K, h, w); labels (B, K, 3): x and y in input pixels, and a weight, 0 where there is no label.

    Labels of okdc's own data have further columns, of the image's origin (`shared.point_labels`).
    """

    name = "pose"
    dims = MAPS
    output = "one tensor of heat maps (batch, key points, height, width), or a list of such of which the last counts"
    metrics = {
        "pck@0.1": Metric("PCK@0.1", about="the share of key points within a tenth of the box's longer side"),
        "pck@0.05": Metric("PCK@0.05"),
        "pck@0.2": Metric("PCK@0.2"),
        "error": Metric("mean error", "error", "in pixels of the source", best="min", unit="px"),
        "ap": Metric("OKS-AP", about="COCO's average precision, by pycocotools"),
    }
    scores = ("pck@0.1", "pck@0.05")
    unsupported = {
        "mixup": "it would lay one animal over another, of which a map has one peak", "cutmix": _PLACES,
        "smoothing": _CLASSES, "balanced_sampling": _CLASSES, "class_weights": _CLASSES, "pos_weight": _CLASSES,
        "scale": _PLACES, "ratio": _PLACES, "crop_padding": _PLACES, "vflip": _PLACES, "aa": _PLACES,
        "color_jitter": "it is not built for key points yet", "reprob": "it would hide points that are labelled",
        "interpolation": "images are cropped by one bilinear map", "train_interpolation": "it is bilinear always",
        "crop_pct": "the box says what is cropped, with a margin", "class_map": _CLASSES, "label_column": _CLASSES,
        "path_column": _CLASSES, "holdout": "neighbouring frames are alike: give images to validate with",
        "distance": "maps are compared as distributions over their pixels", "distance_kwargs": "it has one distance",
        "embed_preprocess": "the crop needs a box, which is not in the image",
    }  # fmt: skip
    loss = "mse of tasks.shared.heatmaps"
    weighing = "pos_weight"
    hub = "keypoint-detection"
    activation = ""
    nouns = ("key point", "key points")
    compared = "key points"
    same = "key points less than half a pixel of the heat map apart"
    use = "Find key points on an image"
    program = "predict_pose.py"

    def __init__(self, noted: Mapping[str, Any]) -> None:
        super().__init__(noted)
        self.maps = Maps.of(noted)

    def result(self, out: Any) -> Any:
        return out[-1] if isinstance(out, (list, tuple)) and out else out

    def earlier(self, out: Any) -> tuple[Tensor, ...]:
        return tuple(out[:-1]) if isinstance(out, (list, tuple)) else ()

    def checked_labels(self, labels: Tensor, count: int, role: str, outputs: int) -> Tensor:
        return checked_points(labels, count, role, outputs)

    def outputs(self, labels: Tensor) -> int:
        return labels.shape[1]

    def per_output(self, labels: Tensor, outputs: int) -> Tensor:
        return (labels[..., 2] > 0).sum(0)

    def made_up(self, numbers: Tensor, outputs: int) -> Tensor:
        height, width = self.maps.input_size[-2:]
        spots = torch.arange(outputs, device=numbers.device) + numbers[:, None]
        points = [spots * 7 % width, spots * 5 % height, torch.ones_like(spots)]
        return torch.stack(points, -1).float()

    def weights(self, labels: Tensor, outputs: int) -> Tensor:
        return torch.ones(outputs)

    def supervised(self, out: Tensor, labels: Tensor) -> Tensor:
        return heatmaps.mse(out, *self.maps.targets(labels, out.shape[2:]))

    def distance(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        *,
        eps: float = 0.0,
        detach: bool = True,
    ) -> Tensor:
        """Nats for each labelled point, of maps as distributions over their pixels; `eps` is not needed."""
        _, weights = self.maps.targets(labels, student.shape[2:])
        return heatmaps.kl(student, teacher, weights, temperature, detach=detach)

    def soft(
        self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, *, detach: bool = True
    ) -> Tensor:
        return self.distance(student, teacher, labels, temperature, detach=detach) / temperature**2

    def scorer(self, outputs: int, others: int = 0) -> PointScorer:
        return PointScorer(self.maps.named(outputs), self.supervised, outputs, others)

    def guessing(self, counts: Tensor) -> float:
        """Nothing: what one place for all images would reach is not known from the counts."""
        return 0.0

    def tally(self) -> PointTally:
        return PointTally(maps=self.maps)

    def detail(self, counts: Tensor | None, names: Sequence[str]) -> dict[str, Any]:
        if counts is None:
            return {"points": None}
        score = KeypointScore.of(counts)
        each = zip(names, score.sums.tolist(), score.each(), strict=True)
        rows = [
            {"name": name, "labelled": int(sums[0]), "pck": right, "error": sums[1] / sums[0]}
            if sums[0]
            else {"name": name, "labelled": 0, "pck": None, "error": None}
            for name, sums, right in each
        ]
        found = score.value()
        told = {"labelled": int(found["points"]), "margin": found["margin@0.1"], "boxes": self.maps.boxes}
        return {"points": {**told, "rows": rows}}

    def said(self, out: Tensor, names: Sequence[str]) -> list[tuple[str, float]]:
        return [(name, 100 * float(peak)) for name, peak in zip(names, out.flatten(1).amax(1), strict=True)]

    def truth(self, label: Tensor, names: Sequence[str]) -> list[str]:
        return [name for name, weight in zip(names, label[:, 2].tolist(), strict=True) if weight > 0]

    def files(self, out: Tensor) -> dict[str, Any]:
        return {"keypoints.json": self.maps.named(out.shape[1]).file(out.shape[2:])}

    def facts(self) -> dict[str, Any]:
        return {"task": self.name, **self.maps.facts()}


TASK = Pose
