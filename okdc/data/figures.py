"""Articulated figures that okdc draws itself, so that key points can be tried without anybody's images.

A figure has a head, a spine and four limbs of two parts each, whose joints turn at random. It faces us, so that its
left limbs begin on the right of the image: a mirrored figure, its sides changed, is a figure again.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from okdc.data.affine import whole
from okdc.data.poses import Boxes, Meta, PoseSource, around
from okdc.system.randomness import derive_seed
from okdc.tasks.shared.point_labels import AREA
from okdc.tasks.shared.skeleton import Skeleton

SIDE = 96  # pixels of an image
TRAIN, VALIDATION = 512, 128
SKELETON = Skeleton(
    names=(
        *("head", "neck", "hip", "left_elbow", "left_hand", "right_elbow", "right_hand"),
        *("left_knee", "left_foot", "right_knee", "right_foot"),
    ),
    edges=((1, 0), (1, 2), (1, 3), (3, 4), (1, 5), (5, 6), (2, 7), (7, 8), (2, 9), (9, 10)),
    pairs=((3, 5), (4, 6), (7, 9), (8, 10)),
)
# Of each edge: its length as a share of the figure, its angle at rest and how far it turns, degrees; 0 is down. Angles
# are those of the whole body for a limb's first part, and of the first part for its second.
PARTS = (
    *((0.18, 180, 20), (0.32, 0, 10), (0.17, 50, 45), (0.17, 20, 60), (0.17, -50, 45), (0.17, -20, 60)),
    *((0.22, 22, 20), (0.22, 0, 30), (0.22, -22, 20), (0.22, 0, 30)),
)


class Figures(Dataset):
    """(PIL image, points (K, 3), Meta) by position; the same figure for a position every time."""

    def __init__(self, count: int, seed: int, boxes: Boxes = "given") -> None:
        self.count, self.seed, self.boxes = count, seed, boxes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> tuple[Image.Image, Tensor, Meta]:
        image, points, size = _figure(self.seed, position)
        x, y, width, height = around(points)
        box = x - 0.05 * size, y - 0.05 * size, width + 0.1 * size, height + 0.1 * size
        area = AREA * box[2] * box[3]
        box = box if self.boxes == "given" else whole(image.size)
        meta = Meta(self.name(position), box, area, max(box[2:]))
        return image, torch.tensor(points, dtype=torch.float32), meta

    def name(self, position: int) -> str:
        """Which figure it is."""
        return f"figure {position} of seed {self.seed}"


def open_figures(boxes: Boxes = "given") -> PoseSource:
    """Figures to train and to validate with, in boxes of their own or in the whole image."""
    return PoseSource(
        Figures(TRAIN, 0, boxes), Figures(VALIDATION, 1, boxes), SKELETON, boxes, f"figures, boxes {boxes}"
    )


@lru_cache(TRAIN + VALIDATION)  # drawing takes longer than training on them, and they are 28 KB each
def _figure(seed: int, position: int) -> tuple[Image.Image, list[list[float]], float]:
    """A figure's image, points (K, 3) and size in pixels."""
    random = np.random.default_rng(derive_seed(seed, position))
    points, size = _posed(random)
    return _drawn(points, size, random), points, size


def _posed(random: np.random.Generator) -> tuple[list[list[float]], float]:
    """Points (K, 3) of a figure in the middle of the image, and its size in pixels."""
    size = SIDE * random.uniform(0.5, 0.75)
    body = random.normal(0, 15)
    at = {1: np.zeros(2)}
    heading = {1: body, 2: body}
    for (start, end), (length, rest, turn) in zip(SKELETON.edges, PARTS, strict=True):
        angle = heading.get(start, body) + rest + random.uniform(-turn, turn)
        at[end] = at[start] + size * length * np.array([math.sin(math.radians(angle)), math.cos(math.radians(angle))])
        if end not in (0, 2):
            heading[end] = angle
    xy = np.array([at[i] for i in range(len(SKELETON.names))])
    middle = SIDE / 2 - 0.5 + random.uniform(-0.08, 0.08, 2) * SIDE
    xy += middle - (xy.min(0) + xy.max(0)) / 2
    return np.column_stack([xy, np.ones(len(xy))]).tolist(), size


def _drawn(points: list[list[float]], size: float, random: np.random.Generator) -> Image.Image:
    """The figure on a ground of blocks, drawn at four times its size and averaged, so that its edges are soft."""
    ground = random.integers(100, 200, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize((4 * SIDE, 4 * SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    ink = tuple(random.integers(0, 90, 3).tolist())
    thick = max(4, round(4 * 0.06 * size))
    places = [(4 * x + 1.5, 4 * y + 1.5) for x, y, _ in points]
    for start, end in SKELETON.edges:
        pen.line([places[start], places[end]], ink, thick)
        for x, y in (places[start], places[end]):
            pen.ellipse([x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2], ink)
    x, y = places[0]
    pen.ellipse([x - thick, y - thick, x + thick, y + thick], ink)
    grain = random.normal(0, 6, (SIDE, SIDE, 1))
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX)) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
