"""The map of an image and that of its points are one: a spot is where its point says, whatever was done to both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from okdc.data.affine import Augmentation, Change, cropped, draw, fitted, inverse, placed, view, whole

SPOTS = torch.tensor([[70.0, 60.5, 1.0], [121.3, 90.0, 0.0]])


def spotted(sigma: float = 4.0) -> Image.Image:
    """A picture of 200 by 160 pixels with a soft spot at each of the points, red and green."""
    y, x = np.mgrid[:160, :200]
    spots = [np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2)) for cx, cy, _ in SPOTS.tolist()]
    return Image.fromarray((255 * np.stack([*spots, 0 * x], -1)).round().astype(np.uint8))


def middle(image: Image.Image, channel: int) -> list[float]:
    """The centre of mass of one colour, x and y."""
    mass = np.asarray(image, dtype=float)[..., channel]
    y, x = np.mgrid[: mass.shape[0], : mass.shape[1]]
    return [float((mass * each).sum() / mass.sum()) for each in (x, y)]


CHANGES = {
    "none": Change(),
    "turned": Change(rotation=35),
    "scaled and moved": Change(scale=0.8, shift=(0.1, -0.05)),
    "mirrored": Change(mirrored=True),
    "all": Change(rotation=-50, scale=1.1, shift=(-0.05, 0.05), mirrored=True),
}


@pytest.mark.parametrize("size", [(96, 128), (40, 32), (300, 400)], ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_a_spot_stays_under_its_point(name: str, size: tuple[int, int]) -> None:
    change = CHANGES[name]
    image, points, matrix = view(spotted(), SPOTS, whole((200, 160)), size, margin=1, change=change, order=[1, 0])
    assert image.size == (size[1], size[0])
    back = [1, 0] if change.mirrored else [0, 1]
    for spot in (0, 1):
        assert middle(image, spot) == pytest.approx(points[back[spot], :2].tolist(), abs=0.1)
    assert points[back, 2].tolist() == [1, 0]  # the weight goes with its point
    torch.testing.assert_close(placed(points[back], inverse(matrix)), SPOTS)


def test_a_turn_is_clockwise_and_the_box_is_in_the_middle() -> None:
    box = (50.0, 40.0, 40.0, 20.0)
    still = fitted(box, (64, 64), 1.25)
    corner = torch.tensor([[50.0, 50.0]])  # the middle of the left side
    assert placed(corner, still)[0].tolist() == pytest.approx([31.5 - 64 / 2.5, 31.5])
    turned = placed(corner, fitted(box, (64, 64), 1.25, Change(rotation=90)))
    assert turned[0].tolist() == pytest.approx([31.5, 31.5 - 64 / 2.5], abs=1e-4)


def test_maps_of_a_batch_are_taken_back_at_once() -> None:
    matrices = torch.stack([fitted((10.0, 5.0, 30.0, 40.0), (32, 32), change=change) for change in CHANGES.values()])
    points = torch.rand(len(CHANGES), 4, 3)
    torch.testing.assert_close(placed(placed(points, matrices), inverse(matrices)), points)
    torch.testing.assert_close(placed(points, matrices)[2], placed(points[2], matrices[2]))


def test_fine_patterns_are_averaged_and_not_sampled() -> None:
    stripes = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8), (160, 100)))
    small = np.asarray(cropped(stripes, fitted(whole((200, 160)), (40, 50)), (40, 50)))
    assert abs(small[2:-2, 2:-2].astype(int) - 127).max() <= 1


def test_changes_depend_on_seed_epoch_and_image_alone() -> None:
    augmentation = Augmentation(hflip=0.5)
    changes = [draw(augmentation, 3, 1, i) for i in range(400)]
    assert changes == [draw(augmentation, 3, 1, i) for i in range(400)]
    for other in (draw(augmentation, 3, 2, 7), draw(augmentation, 4, 1, 7), draw(augmentation, 3, 1, 8)):
        assert other != changes[7]
    assert 0.4 < np.mean([change.mirrored for change in changes]) < 0.6
    assert 0.5 < np.mean([change.rotation != 0 for change in changes]) < 0.7
    assert max(abs(change.rotation) for change in changes) <= 60
    assert 0.75 <= min(change.scale for change in changes) < 0.8 and 1.2 < max(c.scale for c in changes) <= 1.25
    assert draw(Augmentation(0, 0, 0, 0, 0), 3, 1, 7) == Change()
