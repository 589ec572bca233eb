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
from okdc.data.transforms import upright
from okdc.errors import DataError
from okdc.tasks.shared.skeleton import Skeleton, paired_names

Boxes = Literal["given", "frame"]

NO_PAIRS = "none"  # what is said where a mirrored image is as good as the image, and no point changes sides


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
    """(PIL image, points (K, 3) in its pixels, Meta) by position; raises whatever reading the image raises.

    Images are upright, as their EXIF data says unless `exif` is False: people label what they see. Boxes are those of
    the labels, or with `boxes` "frame" the whole image.
    """

    def __init__(self, poses: Sequence[Pose], boxes: Boxes = "given", exif: bool = True) -> None:
        self.poses, self.boxes, self.exif = list(poses), boxes, exif
        self.files = Files(Path(), [pose.file for pose in self.poses], [0] * len(self.poses))

    def __len__(self) -> int:
        return len(self.poses)

    def __getitem__(self, position: int) -> tuple[Image.Image, Tensor, Meta]:
        image, _ = self.files[position]
        image = upright(image) if self.exif else image
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
    def classes(self) -> tuple[str, ...]:
        """The names of the key points."""
        return self.skeleton.names

    @property
    def margin(self) -> float:
        """How much larger than its box the crop of an instance is."""
        return MARGIN if self.boxes == "given" else 1.0

    @property
    def noted(self) -> dict[str, Any]:
        """What the task must know: the skeleton, the boxes, the margin."""
        return {"keypoints": {"skeleton": self.skeleton.facts(), "boxes": self.boxes, "margin": self.margin}}

    def check_flips(self, hflip: float) -> None:
        """Raise DataError where images are to be mirrored and nobody said which points then change places."""
        skeleton = self.skeleton
        if not hflip or skeleton.pairs is not None:
            return
        likely = ",".join(f"{skeleton.names[i]}/{skeleton.names[j]}" for i, j in paired_names(skeleton.names))
        raise DataError(
            f"--hflip {hflip:g} mirrors images, and the data do not say which key points then change places (left and "
            f"right). Say it: --flip-pairs {likely or 'NAME/NAME,...'}; or, where a mirrored image is as likely as the "
            f"image and no points change, --flip-pairs {NO_PAIRS}. Or leave the images as they are: --hflip 0"
        )


def around(points: Sequence[Sequence[float]]) -> Box:
    """The box around labelled points (K, 3), of at least a pixel; of no point, of one pixel at 0."""
    labelled = [point for point in points if point[2] > 0] or [(0.0, 0.0, 1.0)]
    xs, ys = [point[0] for point in labelled], [point[1] for point in labelled]
    return min(xs), min(ys), max(1.0, max(xs) - min(xs)), max(1.0, max(ys) - min(ys))
