"""The figures that okdc draws: the same ones every time, whole, and drawn where their points are."""

from __future__ import annotations

import numpy as np
import torch

from okdc.data.figures import SIDE, SKELETON
from okdc.data.keypoints import open_keypoints


def test_figures_are_the_same_every_time_and_differ_from_one_another() -> None:
    source, again = open_keypoints("figures"), open_keypoints("figures")
    (image, points, meta), (other, same, _) = source.train[5], again.train[5]
    assert image.tobytes() == other.tobytes() and torch.equal(points, same)
    assert not torch.equal(points, source.train[6][1]) and not torch.equal(points, source.validation[5][1])
    assert (len(source.train), len(source.validation)) == (512, 128) and image.size == (SIDE, SIDE)
    source.check_flips(0.5)
    assert meta.length == max(meta.box[2:])


def test_a_figure_is_inside_and_its_points_are_on_it() -> None:
    figures = open_keypoints("figures", "frame").validation
    dark = []
    for i in range(40):
        image, points, meta = figures[i]
        assert meta.box == (-0.5, -0.5, SIDE, SIDE)
        assert points.shape == (len(SKELETON.names), 3) and points[:, 2].all()
        assert points[:, :2].min() >= 0 and points[:, :2].max() <= SIDE - 1
        pixels = np.asarray(image.convert("L"), dtype=float)
        x, y = points[:, :2].round().int().T.numpy()
        dark.append(pixels[y, x].mean() < pixels.mean() - 30)
    assert all(dark)


def test_left_limbs_are_on_the_right_of_a_figure_that_faces_us() -> None:
    figures = open_keypoints("figures").train
    for i in range(40):
        points, names = figures[i][1], SKELETON.names
        spine = points[2, :2] - points[1, :2]
        for part in ("elbow", "knee"):
            across = points[names.index(f"left_{part}"), :2] - points[names.index(f"right_{part}"), :2]
            assert across[0] * spine[1] - across[1] * spine[0] > 0
