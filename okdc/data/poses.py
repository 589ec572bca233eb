"""One split of instances with key points, read image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from okdc.data.affine import MARGIN, Box, whole
from okdc.data.scan import Files
from okdc.tasks.skeleton import Skeleton

Boxes = Literal["given", "frame"]

AREA = 0.53  # of a box, where nobody drew an outline: the share that COCO's people have


@dataclass(frozen=True)
class Pose:
    """One person or animal in one image: `place` says where it is written, `points` (K, 3) are x, y and a weight.

    `box` is that of the labels, or where these have none the one around the labelled points.
    """

    place: str
    file: str
    points: tuple[tuple[float, float, float], ...]
    box: Box
    area: float  # square pixels

    @property
    def labelled(self) -> int:
        return sum(weight > 0 for _, _, weight in self.points)


class Meta(NamedTuple):
    """What belongs to an instance beside its points, in pixels of the source."""

    file: str
    box: Box
    area: float  # of OKS
    length: float  # of PCK: the longer side of the box


class Poses(Dataset):
    """(PIL image as stored, points (K, 3) in its pixels, Meta) by position; raises whatever reading the image raises.

    Boxes are those of the labels, or with `boxes` "frame" the whole image.
    """

    def __init__(self, poses: Sequence[Pose], boxes: Boxes = "given") -> None:
        self.poses, self.boxes = list(poses), boxes
        self.files = Files(Path(), [pose.file for pose in self.poses], [0] * len(self.poses))

    def __len__(self) -> int:
        return len(self.poses)

    def __getitem__(self, position: int) -> tuple[Image.Image, Tensor, Meta]:
        image, _ = self.files[position]
        pose = self.poses[position]
        box = pose.box if self.boxes == "given" else whole(image.size)
        return image, torch.tensor(pose.points), Meta(pose.file, box, pose.area, max(box[2:]))

    def name(self, position: int) -> str:
        """The file of an instance."""
        return self.poses[position].file


@dataclass(frozen=True)
class PoseSource:
    """Key points opened and checked, not yet batched; each split gives (PIL image, points (K, 3), Meta)."""

    train: Any
    validation: Any
    skeleton: Skeleton
    boxes: Boxes
    name: str

    @property
    def margin(self) -> float:
        """How much larger than its box the crop of an instance is."""
        return MARGIN if self.boxes == "given" else 1.0


def around(points: Sequence[Sequence[float]]) -> Box:
    """The box around labelled points (K, 3), of at least a pixel; of no point, of one pixel at 0."""
    labelled = [point for point in points if point[2] > 0] or [(0.0, 0.0, 1.0)]
    xs, ys = [point[0] for point in labelled], [point[1] for point in labelled]
    return min(xs), min(ys), max(1.0, max(xs) - min(xs)), max(1.0, max(ys) - min(ys))
