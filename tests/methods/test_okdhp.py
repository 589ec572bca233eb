"""OKDHP against the numbers of the authors' own code (tests/golden/okdhp_*), in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from okdc import tasks
from okdc.anatomy import Anatomy, Cut
from okdc.anatomy.calls import Call
from okdc.anatomy.stages import Stage
from okdc.cohort import Branch, CohortOutput
from okdc.errors import RecipeError
from okdc.losses import rampup
from okdc.methods.okdhp import FeatureAggregation, Okdhp
from okdc.tasks.shared import heatmaps
from tests.methods.golden import assert_same, load

TASK = tasks.get("pose")
PARITY: dict[str, Any] = {
    "fau": "coded", "temperature": 1.0, "reduction": "official", "kd_weight": 2.0, "ens_weight": 1.0,
    "rampup_epochs": 90, "detach_target": False,
}  # fmt: skip


class Heads(nn.Module):
    """A trunk and three convolutions that give heat maps at a quarter of the images' size: what a cohort says."""

    names = ("target", "branch1", "branch2")
    shared_width = 8

    def __init__(self, keypoints: int = 5) -> None:
        super().__init__()
        self.anatomy = SimpleNamespace(num_classes=keypoints, input_size=(3, 32, 24))
        self.task = tasks.get("pose", {"input_size": (3, 32, 24)})
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
        self.heads = nn.ModuleList(nn.Conv2d(8, keypoints, 3, padding=1) for _ in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def forward(self, images: Tensor) -> CohortOutput:
        shared = self.trunk(images)
        return CohortOutput(tuple(head(shared) for head in self.heads), shared=shared)


def method(**settings: Any) -> Okdhp:
    torch.manual_seed(0)
    return Okdhp(Heads(), **settings)  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(4, 5, 3, generator=generator) * torch.tensor([24, 32, 1])
    return torch.randn(4, 3, 32, 24, generator=generator), torch.cat([points[..., :2], torch.ones(4, 5, 1)], -1)


@pytest.mark.parametrize("variant", ["nodetach", "detach"])
def test_losses_and_gradients(variant: str) -> None:
    t, meta = load("okdhp_loss")
    expected = meta["variants"][variant]
    okdhp = method(**PARITY | {"detach_target": expected["target_detached"]}).double()
    okdhp.epoch.fill_(meta["epoch"])
    outputs = [t[f"heatmap_{i}"].requires_grad_() for i in range(7)]
    scores, weights = t["branch_scores"].requires_grad_(), t["target_weight"][..., 0]
    fused = TASK.blend(scores.softmax(1), tuple(outputs[i] for i in expected["fused_from"]))
    assert_same(fused, t[f"fused_{variant}"])
    parts = okdhp.heat_map_losses({str(i): x for i, x in enumerate(outputs)}, fused, t["target"], weights)
    ramp = rampup(okdhp.epoch, okdhp.rampup_epochs)
    assert_same(ramp, meta["ramp_weight"])
    for i in range(7):
        assert_same(parts[f"mse/{i}"], expected["mse_per_output"][i])
        assert_same(parts[f"kd/{i}"] / ramp / meta["kd_weight"], expected["kl_per_output"][i])
    assert_same(parts["mse/ensemble"], expected["loss_ens_weighted"])
    assert_same(sum(v for k, v in parts.items() if k.startswith("kd/")), expected["loss_soft_weighted"])
    assert_same(sum(parts.values()), expected["total"])
    sum(parts.values()).backward()
    for i, output in enumerate(outputs):
        assert_same(output.grad, t[f"d_heatmap_{i}_{variant}"])
    assert_same(scores.grad, t[f"d_branch_scores_{variant}"])


def test_rampup() -> None:
    _, meta = load("okdhp_loss")
    for epoch, weight in meta["rampup_table"].items():
        assert_same(rampup(torch.tensor(float(epoch), dtype=torch.float64), meta["rampup_epochs"]), weight)


def test_the_unit_as_coded() -> None:
    t, meta = load("okdhp_fau")
    unit = FeatureAggregation(meta["C"], meta["n_branches"], meta["J"], "coded", squeeze=meta["mid"]).double()
    state = {}
    for i in range(3):
        state |= {f"scales.{i}.0.{key}": t[f"conv{i}_conv_{key}"] for key in ("weight", "bias")}
        state |= {f"scales.{i}.1.{key}": t[f"conv{i}_bn_{key}"] for key in ("weight", "bias")}
        state |= {f"scales.{i}.1.{key}": t[f"conv{i}_bn_{key}"] for key in ("running_mean", "running_var")}
        state |= {f"members.{i}.{key}": t[f"branch_fc{i}_{key}"] for key in ("weight", "bias")}
    state |= {f"squeeze.{key}": t[f"squeeze_fc_{key}"] for key in ("weight", "bias")}
    unit.load_state_dict(state)
    maps = tuple(t[f"branch_heatmap_{i}"] for i in range(3))
    for mode in ("eval", "train"):
        weights = unit.train(mode == "train")(t["feature"])
        assert_same(weights, t[f"branch_weights_{mode}"])
        assert_same(TASK.blend(weights, maps), t[f"fused_{mode}"])


def test_what_a_step_of_it_is_made_of() -> None:
    okdhp, (images, points) = method(kd_weight=3.0, ens_weight=2.0, rampup_epochs=0), batch()
    points[0, :, 2] = 0
    okdhp.eval()
    out, parts = okdhp.cohort(images), okdhp(images, points)
    targets = heatmaps.render(points, (8, 6), 4.0, sigma=1.5)
    weights = heatmaps.weights(points, (8, 6), 4.0, sigma=1.5)
    fused = okdhp.ensemble(out)
    torch.testing.assert_close(parts["mse/ensemble"], 2 * heatmaps.mse(fused, targets, weights))
    torch.testing.assert_close(parts["mse/branch2"], heatmaps.mse(out.logits[2], targets, weights))
    torch.testing.assert_close(parts["kd/target"], 3 * heatmaps.kl(out.logits[0], fused, weights, 0.1))
    assert list(parts) == ["mse/ensemble", "mse/target", "kd/target", "mse/branch1", "kd/branch1", "mse/branch2",
                           "kd/branch2"]  # fmt: skip


@pytest.mark.parametrize("fau", ["light", "coded"])
def test_everything_learns_and_a_batch_without_labels_teaches_nothing(fau: str) -> None:
    okdhp, (images, points) = method(fau=fau), batch()
    okdhp.epochs.fill_(2), okdhp.epoch.fill_(1)
    parts = okdhp.train()(images, points)
    sum(parts.values()).backward()
    still = [name for name, p in okdhp.named_parameters() if not p.grad.any()]
    assert [name for name in still if not name.endswith(".bias")] == []
    okdhp.zero_grad()
    points[..., 2] = 0
    sum(okdhp(images, points).values()).backward()
    assert not any(p.grad.any() for p in okdhp.parameters())


def test_losses_are_full_precision_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        parts = method().train()(*batch())
    assert {value.dtype for value in parts.values()} == {torch.float32}


def anatomy(head: float) -> Anatomy:
    """A backbone of two stages, and a head with this share of the FLOPs."""
    stages = tuple(
        Stage(size, f"features.{i}", f"features.{i - 1}", f"features.{i}", ((f"features.{i}.0",),), 1, 10 * i)
        for i, size in ((1, 64), (2, 16))
    )
    ends = {"features.0": 1, "features.1.0": 9, "features.1": 10, "features.2.0": 19, "features.2": 20, "features": 21}
    calls = tuple(Call(name, "", False, end - 1, end, 0, 0, (), ((),), False, False) for name, end in ends.items())
    after = {"features.0": 0.9, "features.1": 0.5, "features.2": head, "features": head}
    cuts = tuple(Cut(name, (8, 4, 4), share, share) for name, share in after.items())
    return Anatomy("Pose", (3, 32, 32), 5, 1, 1, calls, stages=stages, cuts=cuts)


def test_the_whole_backbone_is_shared_unless_asked() -> None:
    assert Okdhp.plan(anatomy(0.2)) == [Branch("features", ())] * 2
    assert Okdhp.plan(anatomy(0.2), private_stages=1) == [Branch("features.1", (0,))] * 2
    assert Okdhp.plan(anatomy(0.2), cut="features.0", members=2) == [Branch("features.0", (0, 0))]
    assert Okdhp.plan(anatomy(0.01)) == [Branch("features.1", (0,))] * 2  # what is left is no head


def test_unbalanced_branches_grow_at_their_end() -> None:
    grown = Okdhp.plan(anatomy(0.2), private_stages=1, extra_blocks=2)
    assert grown == [Branch("features.1", (2,)), Branch("features.1", (4,))]
    assert Okdhp.depth(2, 3, 2) == (0, 0, 4)
    with pytest.raises(RecipeError, match=r"no block to repeat.*--private-stages 1"):
        Okdhp.plan(anatomy(0.2), extra_blocks=2)
