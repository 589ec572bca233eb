"""Scores of key points against golden values, pycocotools, and cases that can be counted by hand."""

from __future__ import annotations

import sys

import pytest
import torch

from okdc.errors import DataError
from okdc.tasks.shared.keypoint_scores import KeypointScore, average_precision, distances, moved, oks
from okdc.tasks.shared.skeleton import COCO, Skeleton, paired_names
from tests.methods.golden import assert_same, load


def labelled(points: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    return torch.cat([points, visible[..., None].to(points)], -1)


def test_oks_and_pckh_of_the_golden_file() -> None:
    t, meta = load("okdhp_pose_metrics")
    true = labelled(t["kpt_gt"], t["kpt_visible"])
    assert_same(oks(t["kpt_pred"], true, t["oks_area"], t["oks_sigmas"].tolist()), t["oks"])
    # PCKh@0.5 is PCK at half of 0.6 of the head; the score's own thresholds are lower, so its length is longer.
    score = KeypointScore(6)
    score.update(t["kpt_pred"], true, meta["sc_bias"] * t["head_size"] * 0.5 / 0.2)
    assert_same(torch.tensor(score.each(0.2)), t["pckh_per_joint"])
    assert_same(torch.tensor(score.value()["pck@0.2"]), meta["pckh_mean"])


def test_pck_of_maps_as_the_authors_count_it() -> None:
    t, meta = load("okdhp_pose_metrics2")
    found, true = t["pred_coords"], t["gt_coords"]
    norm = torch.tensor([30.0, 20.0], dtype=torch.float64) / 10  # swapped, as written
    counted = (true > 1).all(-1)
    score = KeypointScore(4)
    score.update(
        found / norm, labelled(true / norm, counted), torch.full((8,), 5 - 1e-6, dtype=torch.float64)
    )  # they ask for less than .5
    each = torch.tensor(score.each())
    assert_same(each[~each.isnan()] / 100, t["acc_per_joint"][1:][t["acc_per_joint"][1:] >= 0])
    assert int((~each.isnan()).sum()) == meta["pck_count"] == 4 - int((t["acc_per_joint"][1:] < 0).sum())
    assert_same(each.nanmean() / 100, meta["pck_avg"])


def test_points_without_a_label_do_not_count_and_parts_add_up() -> None:
    true = torch.tensor([[[10.0, 10, 1], [50, 50, 1], [0, 0, 0]], [[10, 10, 1], [50, 50, 0], [0, 0, 0]]])
    predicted = torch.tensor([[[13.0, 14], [50, 50], [9, 9]], [[10, 31], [0, 0], [9, 9]]])
    score, parts = KeypointScore(3), [KeypointScore(3) for _ in range(2)]
    score.update(predicted, true, torch.tensor([100.0, 100.0]))
    assert score.value() | {"points": 3, "error": 26 / 3, "pck@0.2": 200 / 3} == pytest.approx(score.value())
    assert score.value()["pck@0.05"] == pytest.approx(200 / 3)  # 5 pixels of 100 are just right
    assert score.each()[:2] == [50, 100] and score.each()[2] != score.each()[2]
    for i, part in enumerate(parts):
        part.update(predicted[i : i + 1], true[i : i + 1], torch.tensor([100.0]))
    parts[0].sums += parts[1].sums
    parts[0].squares += parts[1].squares
    assert parts[0].value() == score.value()


def test_the_margin_is_that_of_instances() -> None:
    """Forty points in ten images, half of the images all wrong: no more is known than of ten points."""
    true = torch.zeros(10, 4, 3) + torch.tensor([5.0, 5.0, 1.0])
    predicted = true[..., :2].clone()
    predicted[:5] += 90
    score = KeypointScore(4)
    score.update(predicted, true, torch.full((10,), 50.0))
    assert score.value()["pck@0.1"] == 50
    assert score.value()["margin@0.1"] == pytest.approx(100 * 1.96 * (0.25 / 10) ** 0.5)


def test_nothing_labelled_is_no_number() -> None:
    score = KeypointScore(2)
    assert all(value != value for name, value in score.value().items() if name != "points")


def test_what_moves_by_half_a_pixel_of_the_map() -> None:
    reference = torch.tensor([[[40.0, 40.0], [40, 40], [40, 40]]])
    points = reference + torch.tensor([[[1.9, 0.0], [0, 1.9], [1.0, 1.0]]])
    assert moved(points, reference, (4.0, 4.0)).tolist() == [[False, False, False]]
    assert moved(points, reference, (3.0, 4.0)).tolist() == [[False, True, False]]  # of height, of width
    assert moved(reference, reference, (4.0, 4.0)).sum() == 0


def test_average_precision_is_that_of_pycocotools() -> None:
    pytest.importorskip("pycocotools", reason="OKS-AP needs pycocotools: pip install 'okdc[pose]'")
    generator = torch.Generator().manual_seed(0)
    true = torch.cat([100 * torch.rand(20, 4, 2, generator=generator), torch.ones(20, 4, 1)], -1)
    true[0] = 0  # without a label: left out, wherever it is found
    true[1, 2:, 2] = 0
    areas, images, sigmas = torch.full((20,), 2500.0), [i // 2 for i in range(20)], (0.05,) * 4
    found = torch.cat([true[..., :2] + (torch.arange(20) == 0)[:, None, None] * 30, torch.ones(20, 4, 1)], -1)
    right = average_precision(found, true, areas, images, sigmas)
    assert right == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100, "AR": 100})
    nothing = average_precision(true, true * torch.tensor([1, 1, 0]), areas, images, sigmas)
    assert all(value != value for value in nothing.values())
    shifted = true.clone()
    shifted[..., 0] += 5  # d^2 = 25 of area 2500 and sigma .05: exp(-25 / (2 * 2500 * .01)) = .61, right at 3 of 10
    assert oks(shifted, true, areas, sigmas)[1:].tolist() == pytest.approx([0.6065] * 19, abs=1e-4)
    found = average_precision(torch.cat([shifted[..., :2], torch.ones(20, 4, 1)], -1), true, areas, images, sigmas)
    assert found == pytest.approx({"AP": 30, "AP50": 100, "AP75": 0, "AR": 30})


def test_without_pycocotools_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    points = torch.ones(1, 2, 3)
    with pytest.raises(DataError, match=r"pip install 'okdc\[pose\]'"):
        average_precision(points, points, torch.ones(1), [0], (0.05, 0.05))


def test_distances() -> None:
    assert distances(torch.tensor([[[3.0, 4.0, 1.0]]]), torch.zeros(1, 1, 3)).tolist() == [[5.0]]


def test_a_skeleton_knows_what_a_mirror_swaps() -> None:
    assert Skeleton(("a", "b")).pairs is None and Skeleton(("a", "b")).sigmas == (0.05, 0.05)
    assert Skeleton(("nose", "left", "right"), pairs=((1, 2),)).mirrored() == [0, 2, 1]
    person = Skeleton(COCO)
    assert person.pairs is not None and len(person.pairs) == 8 and person.sigmas[0] == 0.026
    assert [COCO[i].replace("left", "right") for i, _ in person.pairs] == [COCO[j] for _, j in person.pairs]
    assert paired_names(("LeftEar", "RightEar", "tail")) == ((0, 1),)
