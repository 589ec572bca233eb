"""One affine map takes an image and its key points into the network's input, and predictions back.

Matrices are (..., 2, 3) float64 and take x and y in pixels of the source to pixels of the input; the middle of the
first pixel is 0 in both. What augments is part of the map: an image is turned, scaled, moved and mirrored at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from okdc.system.randomness import derive_seed

Box = tuple[float, float, float, float]  # x, y, width, height

MARGIN = 1.25  # of the input, in boxes that are cropped to


@dataclass(frozen=True)
class Augmentation:
    """How far images are changed: the spread of rotation in degrees and of scale, both normal and cut at twice that.

    `rotated` is the share that is turned at all, `shift` the largest move as a share of the input's sides, `hflip` the
    share that is mirrored.
    """

    rotation: float = 30.0
    rotated: float = 0.6
    scale: float = 0.125
    shift: float = 0.05
    hflip: float = 0.0


@dataclass(frozen=True)
class Change:
    """What is done to one image: degrees, a factor, a move right and down as shares of the sides, mirrored or not."""

    rotation: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    mirrored: bool = False


def draw(augmentation: Augmentation, seed: int, epoch: int, index: int) -> Change:
    """The change of a training image, which depends on these numbers alone."""
    random = np.random.default_rng(derive_seed(seed, epoch, index, 5))
    turn, factor = np.clip(random.standard_normal(2), -2, 2)
    turned, mirrored = random.random(2)
    right, down = random.uniform(-1, 1, 2)
    return Change(
        augmentation.rotation * float(turn) * (turned < augmentation.rotated),
        1 + augmentation.scale * float(factor),
        (augmentation.shift * float(right), augmentation.shift * float(down)),
        bool(mirrored < augmentation.hflip),
    )


def whole(size: tuple[int, int]) -> Box:
    """The box of a frame of (width, height)."""
    return -0.5, -0.5, float(size[0]), float(size[1])


def fitted(box: Box, size: Sequence[int], margin: float = 1.0, change: Change | None = None) -> Tensor:
    """The map (2, 3) that puts a box into the middle of an input of (height, width), its aspect kept, and changes it.

    >>> fitted((10.0, 20.0, 8.0, 4.0), (8, 8)) @ torch.tensor([14.0, 22.0, 1.0], dtype=torch.float64)  # the middle
    tensor([3.5000, 3.5000], dtype=torch.float64)
    """
    x, y, width, height = box
    change = change or Change()
    scale = change.scale * min(size[1] / width, size[0] / height) / margin
    angle, side = math.radians(change.rotation), -1.0 if change.mirrored else 1.0
    linear = scale * torch.tensor(
        [[side * math.cos(angle), -side * math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    middle = torch.tensor([x + width / 2, y + height / 2], dtype=torch.float64)
    right, down = change.shift
    to = torch.tensor([(size[1] - 1) / 2 + right * size[1], (size[0] - 1) / 2 + down * size[0]], dtype=torch.float64)
    return torch.cat([linear, (to - linear @ middle)[:, None]], 1)


def placed(points: Tensor, matrix: Tensor) -> Tensor:
    """Points (..., K, 2 or more) taken by the map (..., 2, 3); what follows x and y is as it was."""
    xy = points[..., :2].to(matrix) @ matrix[..., :2].mT + matrix[..., None, :, 2]
    return torch.cat([xy.to(points), points[..., 2:]], -1)


def inverse(matrix: Tensor) -> Tensor:
    """The maps (..., 2, 3) back."""
    back = torch.linalg.inv(matrix[..., :2])
    return torch.cat([back, -(back @ matrix[..., 2:])], -1)


def cropped(image: Image.Image, matrix: Tensor, size: Sequence[int]) -> Image.Image:
    """What the map (2, 3) makes of an image, (height, width); black where it has nothing.

    Before it is made smaller by a half or more its pixels are averaged in blocks, so that none is passed over.
    """
    block = int(1 / math.sqrt(abs(float(torch.linalg.det(matrix[:, :2])))))
    back = inverse(matrix)
    # Pillow's coordinates begin at the corner of the first pixel.
    linear = back[:, :2]
    offset = back[:, 2] + 0.5 - linear.sum(1) / 2
    if block > 1:
        image = image.reduce(block)
        linear, offset = linear / block, offset / block
    data = torch.cat([linear, offset[:, None]], 1).flatten().tolist()
    return image.transform((size[1], size[0]), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)


def view(
    image: Image.Image,
    points: Tensor,
    box: Box,
    size: Sequence[int],
    *,
    margin: float = MARGIN,
    change: Change | None = None,
    order: Sequence[int] = (),
) -> tuple[Image.Image, Tensor, Tensor]:
    """The input image, its points (K, 3) in input pixels, and the map that led there.

    `order` is `Skeleton.mirrored()`: which point stands in the place of each when the change mirrors the image.
    """
    matrix = fitted(box, size, margin, change)
    there = placed(points, matrix)
    if change and change.mirrored:
        there = there[list(order)]
    return cropped(image, matrix, size), there, matrix
