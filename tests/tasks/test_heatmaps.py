"""Heat maps against the numbers of OKDHP's own code (tests/golden/okdhp_*), and against what they must do exactly."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest
import torch
from torch import Tensor

from okdc.data import affine, keypoints
from okdc.tasks.shared import heatmaps, skeleton
from tests.methods.golden import assert_same, load

SIZE, INPUT = (24, 18), (96, 72)
STRIDE = heatmaps.stride_of(INPUT, SIZE)


def scattered(count: int = 500) -> Tensor:
    """Points (count, 1, 3) anywhere on the input but in the half of a map's pixel along its border."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(count, 1, 2, generator=generator, dtype=torch.float64)
    return torch.cat([4 + unit * torch.tensor([INPUT[1] - 9, INPUT[0] - 9]), torch.ones(count, 1, 1)], -1)


def in_pixels(found: Tensor, points: Tensor) -> Tensor:
    """Errors (N, K) in pixels of the map."""
    return (found[..., :2] - points[..., :2]).norm(dim=-1) / 4


def test_official_targets() -> None:
    t, meta = load("okdhp_pose_metrics")
    points = torch.cat([t["mu"], torch.ones_like(t["mu"][..., :1])], -1)
    points[0, 1, 2] = 0  # which the authors' targets leave out
    maps = heatmaps.render(points, (16, 16), 1.0, meta["sigma"], "official")
    assert_same(maps * points[..., 2, None, None], t["target"])


@pytest.mark.parametrize("name", ["okdhp_pose_metrics", "okdhp_pose_metrics2"])
def test_official_decoding(name: str) -> None:
    t, _ = load(name)
    found = heatmaps.decode(t["pred"], 1.0, "official")
    assert_same(found[..., :2], t["pred_coords_quarter"])
    assert_same(found[..., 2:], t["pred_maxvals"])
    assert (t["pred_maxvals"] <= 0).any() or name == "okdhp_pose_metrics"
    assert_same(heatmaps.decode(t["pred"], 4.0, "official")[..., :2], 4 * t["pred_coords_quarter"])


def test_a_point_is_found_where_it_was() -> None:
    points = scattered()
    maps = heatmaps.render(points, SIZE, STRIDE)
    assert in_pixels(heatmaps.decode(maps, STRIDE), points).max() < 1e-9
    stored = (255 * maps).round() / 255
    assert in_pixels(heatmaps.decode(stored, STRIDE), points).mean() < 0.02
    noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert in_pixels(heatmaps.decode(maps + 0.02 * noise, STRIDE), points).mean() < 0.12
    official = heatmaps.render(points, SIZE, STRIDE, encoding="official")
    assert in_pixels(heatmaps.decode(official, STRIDE, "official"), points).mean() > 0.3  # what rounding costs


def test_sides_may_have_strides_of_their_own() -> None:
    points = torch.tensor([[[40.3, 61.7, 1.0]]])
    stride = heatmaps.stride_of((96, 80), (32, 16))
    assert stride == (3.0, 5.0)
    torch.testing.assert_close(
        heatmaps.decode(heatmaps.render(points, (32, 16), stride), stride)[..., :2], points[..., :2]
    )


def test_a_mirrored_image_has_mirrored_maps() -> None:
    points = scattered(8)
    mirrored = points.clone()
    mirrored[..., 0] = INPUT[1] - 1 - points[..., 0]
    both = heatmaps.render(points, SIZE, STRIDE).flip(-1), heatmaps.render(mirrored, SIZE, STRIDE)
    torch.testing.assert_close(*both)


def test_what_leaves_nothing_on_the_map_has_no_weight() -> None:
    xs = [-40.0, -20.0, 30.0, 90.0, 110.0]  # sigma 2 maps pixels reach 24 input pixels
    points = torch.tensor([[[x, 40.0, 1.0] for x in xs] + [[30.0, 40.0, 0.0]]])
    for encoding in ("exact", "official"):
        assert heatmaps.weights(points, SIZE, STRIDE, encoding=encoding).tolist() == [[0, 1, 1, 1, 0, 0]]


def test_a_flat_or_broken_map_gives_finite_points() -> None:
    maps = torch.stack([torch.zeros(6, 5), torch.ones(6, 5), -torch.ones(6, 5), torch.eye(6, 5)])[None]
    for encoding in ("exact", "official"):
        found = heatmaps.decode(maps, 4.0, encoding)
        assert found.isfinite().all() and found[0, :, 2].tolist() == [0, 1, -1, 1]


def test_distances_of_maps_without_labels_are_zero_and_have_no_gradient() -> None:
    student, teacher = (torch.randn(3, 4, 6, 5).requires_grad_() for _ in range(2))
    nothing = torch.zeros(3, 4)
    parts = [heatmaps.mse(student, teacher, nothing)]
    for reduction in ("mean", "official"):
        parts.append(heatmaps.kl(student, teacher, nothing, 0.1, reduction=reduction, detach=False))
    sum(parts).backward()
    assert [part.item() for part in parts] == [0, 0, 0]
    assert not student.grad.any() and not teacher.grad.any()


def test_reductions_of_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 6, 5, generator=generator) for _ in range(2))
    weights = torch.tensor([[1.0, 1, 0, 0]] * 3)
    mean, official = (heatmaps.kl(student, teacher, weights, 0.5, reduction=how) for how in ("mean", "official"))
    torch.testing.assert_close(official, mean * 2 / 30)
    naive = [
        0.25 * torch.nn.functional.kl_div(
            (student[b, k].flatten() * 2).log_softmax(0), (teacher[b, k].flatten() * 2).log_softmax(0),
            log_target=True, reduction="sum",
        )
        for b in range(3) for k in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(mean, torch.stack(naive).mean())
    halves = [heatmaps.kl(student[i : i + 1], teacher[i : i + 1], weights[i : i + 1], 0.5) for i in range(3)]
    torch.testing.assert_close(mean, torch.stack(halves).mean())  # parts of a batch add up


def test_losses_are_full_precision() -> None:
    maps = torch.randn(2, 3, 6, 5).bfloat16()
    assert heatmaps.mse(maps, maps, torch.ones(2, 3)).dtype == torch.float32
    assert heatmaps.kl(maps, maps, torch.ones(2, 3)).dtype == torch.float32
    assert heatmaps.decode(maps, 4.0).dtype == torch.float32


@pytest.mark.parametrize("module", [affine, heatmaps, keypoints, skeleton], ids=lambda module: module.__name__)
def test_examples_say_what_they_give(module: ModuleType) -> None:
    said: list[str] = []
    names = vars(module) | {"torch": torch}
    found = [each for each in doctest.DocTestFinder().find(module, globs=names) if each.examples]
    assert found
    assert [each.name for each in found if doctest.DocTestRunner().run(each, out=said.append).failed] == [], said
