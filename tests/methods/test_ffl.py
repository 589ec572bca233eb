"""FFL against the numbers of the authors' own code (tests/golden/ffl_*), in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.deploy import targets
from okdc.losses import rampup
from okdc.methods.ffl import Ffl, Fusion
from okdc.methods.shared.parts import on_one_grid
from tests.helpers.networks import Depthwise, Tiny, Tokens
from tests.methods.golden import assert_same, load


def method(members: int = 2, **settings: object) -> Ffl:
    branches = [Branch("early") for _ in range(members - 1)]
    return Ffl(Cohort(Tiny(), torch.randn(2, 3, 32, 32), branches, taps=Ffl.taps), **settings).double()


def golden_fusion(t: dict[str, Tensor]) -> Fusion:
    fusion = Fusion(t["dw_weight"].shape[0], t["pw_weight"].shape[0], t["fc_weight"].shape[0]).double()
    own = fusion.state_dict()
    state = {k: t.get(k.replace(".", "_"), own[k]) for k in own}
    assert sum(k.replace(".", "_") in t for k in own) == 12
    fusion.load_state_dict(state)
    return fusion


def by_name(parts: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """The parts under the golden files' names, without the ramp."""
    names = {"target": "sub1", "branch1": "sub2", "branch2": "sub3", "fused": "fused"}
    weights = {"ce": ("ce", 1.0), "kd": ("kl", weight)}
    found = {}
    for key, value in parts.items():
        kind, _, who = key.partition("/")
        found[f"{weights[kind][0]}_{names[who]}"] = value / weights[kind][1]
    return found


@pytest.mark.parametrize("form", ["official", "exact"])
def test_losses_and_gradients(form: str) -> None:
    t, meta = load("ffl_loss")
    ffl = method(rampup_epochs=meta["rampup_epochs"], eps=meta["kl_target_eps"] if form == "official" else 0.0)
    ffl.epoch.fill_(meta["epoch"])
    leaves = [t[k].requires_grad_() for k in ("z_sub1", "z_sub2", "z_fused")]
    parts = ffl.mutual_losses(leaves[:2], leaves[2], t["labels"])
    expected = meta["components"] | (meta["exactkl"]["components"] if form == "exact" else {})
    got = by_name(parts, meta["ramp_weight"])
    assert set(got) == set(expected)
    for key, value in got.items():
        assert_same(value, expected[key])
    total = sum(parts.values())
    assert_same(total, meta["exactkl"]["total"] if form == "exact" else meta["total"])
    total.backward()
    for key, leaf in zip(("dz_sub1", "dz_sub2", "dz_fused"), leaves, strict=True):
        assert_same(leaf.grad, t[f"{key}_exactkl" if form == "exact" else key])


def test_rampup_and_its_share_of_a_short_run() -> None:
    _, meta = load("ffl_loss")
    for epoch, weight in meta["rampup_table"].items():
        assert_same(rampup(torch.tensor(float(epoch)).double(), 80), weight)
    t, _ = load("ffl_loss")
    leaves, labels = [t["z_sub1"], t["z_sub2"]], t["labels"]
    fixed, share = method(rampup_epochs=80), method()
    fixed.epoch.fill_(20), share.epoch.fill_(2), share.epochs.fill_(30)
    for mine, theirs in zip(*(m.mutual_losses(leaves, t["z_fused"], labels).values() for m in (fixed, share))):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["ffl_fusion", "ffl_fusion_hetero"])
def test_fusion_end_to_end(name: str) -> None:
    t, meta = load(name)
    maps = [t[f"f{i + 1}"].requires_grad_() for i in range(meta.get("N", 2))]
    heads = [(t[f"sub{i + 1}_fc_weight"].requires_grad_(), t[f"sub{i + 1}_fc_bias"]) for i in range(len(maps))]
    logits = [x.mean((2, 3)) @ w.T + b for x, (w, b) in zip(maps, heads, strict=True)]
    ffl = method(len(maps), rampup_epochs=0, eps=1e-7 if name == "ffl_fusion" else 0.0, kd_weight=meta["ramp_weight"])
    ffl.fusion = golden_fusion(t)
    out = CohortOutput(tuple(logits), tuple(maps))
    assert_same(ffl.eval().ensemble(out), t["z_fused_eval"])
    fused = ffl.train().ensemble(out)
    assert_same(fused, t["z_fused_train"])
    for key in [k for k in t if k.startswith("after_train_")]:
        bn, _, kind = key.removeprefix("after_train_").partition("_running_")
        assert_same(ffl.fusion.get_buffer(f"{bn}.running_{kind}"), t[key])
    for i, z in enumerate(logits):
        assert_same(z, t[f"z_sub{i + 1}"])
    parts = ffl.mutual_losses(logits, fused, t["labels"])
    for key, value in by_name(parts, meta["ramp_weight"]).items():
        assert_same(value, meta["components"][key])
    assert_same(sum(parts.values()), meta["total"])
    sum(parts.values()).backward()
    for i, leaf in enumerate(maps):
        assert_same(leaf.grad, t[f"df{i + 1}"])
    checked = {f"d_{k.replace('.', '_')}": p.grad for k, p in ffl.fusion.named_parameters()}
    checked |= {f"d_sub{i + 1}_fc_weight": w.grad for i, (w, _) in enumerate(heads)}
    for key in [k for k in t if k.startswith("d_")]:
        assert_same(checked[key], t[key])


def test_size_and_start_of_the_fusion_module() -> None:
    torch.manual_seed(0)
    fusion = Fusion(128, 64, 100)
    assert sum(p.numel() for p in fusion.parameters()) == 16_228  # spec: measured on the authors' module
    assert abs(fusion.dw.weight.std() - (2 / (9 * 128)) ** 0.5) < 2e-3
    assert abs(fusion.pw.weight.std() - (2 / 64) ** 0.5) < 5e-3


def test_the_fused_logits_are_the_ensemble_and_the_module_has_its_own_weight_decay() -> None:
    images = torch.randn(4, 3, 32, 32)
    ffl = Ffl(Cohort(Tiny(), images, [Branch("early")], taps=Ffl.taps)).eval()
    out = ffl.cohort(images)
    assert torch.equal(ffl.ensemble(out), ffl.fusion(out.feature_maps))
    networks, fusion = ffl.param_groups(0.1)
    assert "weight_decay" not in networks and fusion["weight_decay"] == 1e-5 and fusion["lr"] == 0.1
    assert {id(p) for p in fusion["params"]} == {id(p) for p in ffl.fusion.parameters()}
    assert len(networks["params"]) + len(fusion["params"]) == len(list(ffl.parameters()))


def test_networks_of_unequal_kind() -> None:
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    plan = Ffl.plan(inspect(Tiny(), images), peers=[Tiny(width=5), Tokens()])
    ffl = Ffl(Cohort(Tiny(), images, plan, taps=Ffl.taps))
    sum(ffl(images, labels).values()).backward()
    assert ffl.fusion.dw.in_channels == 32 + 20 + 16 and ffl.fusion.pw.out_channels == 32
    assert all(p.grad is not None for p in ffl.parameters())


def test_tokens_are_laid_out_as_the_grid_of_patches() -> None:
    grid = torch.arange(2 * 6 * 4.0).reshape(1, 2, 6, 4)
    tokens = torch.cat([torch.full((1, 2, 1), -1.0), grid.flatten(2)], 2).unsqueeze(-1)
    assert torch.equal(on_one_grid([tokens], 1.5)[0], grid)
    assert torch.equal(on_one_grid([tokens[:, :, 1:]], 1.5)[0], grid)
    small = torch.randn(1, 3, 3, 2)
    pooled, same = on_one_grid([tokens, small], 1.5)
    assert torch.equal(same, small) and pooled[0, 0, 0, 0] == grid[0, 0, :2, :2].mean()
    for aspect in (0.05, 0.3, 1.0, 20.0):
        assert all(on_one_grid([torch.randn(1, 2, n, 1)], aspect)[0].numel() for n in range(1, 20))


@pytest.mark.parametrize("peers", [[], [Depthwise()]], ids=["branch", "peer"])
def test_the_fused_classifier_is_a_network_that_can_be_exported(peers: list, tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(5, 3, 32, 32)
    target = Tiny()
    ffl = Ffl(Cohort(target, images, Ffl.plan(inspect(target, images), peers=peers), taps=Ffl.taps))
    sum(ffl(images, torch.arange(5) % 4).values()).backward()
    expected = ffl.eval().ensemble(ffl.cohort(images)).detach()
    fused = ffl.byproducts()["fused"].eval()
    assert not any(p.grad is not None for p in fused.parameters())
    assert not {id(p) for p in fused.parameters()} & {id(p) for p in ffl.parameters()}
    ffl.strip()
    with torch.no_grad():
        for p in ffl.parameters():
            p.zero_()
        torch.testing.assert_close(fused(images), expected)
    to_onnx = targets.find("onnx").module
    facts = to_onnx.write(fused, images, tmp_path / "fused.onnx")
    assert facts["path"] == "dynamo" and facts["dynamic_batch"]
    run = to_onnx.runner(tmp_path / "fused.onnx")
    for size in (1, 2, 5):
        assert_same(torch.from_numpy(run(images[:size].numpy())), expected[:size], 1e-4)
