"""OEMC against the numbers of the authors' own code (tests/golden/oemc_*), in float64, and what its students become."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import okdc
import okdc.networks  # (registers the CIFAR networks)
from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.errors import RecipeError
from okdc.methods.oemc import Oemc, stem
from tests.helpers.networks import Tiny, Tokens, conv
from tests.methods.golden import assert_same, load

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ThreeStages(nn.Module):
    """A stem and three stages of 8, 12 and 16 channels, which thirds narrow as the golden file has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.one, self.two, self.three = (
            nn.Sequential(conv(before, width, 2), Residual(width)) for before, width in ((8, 8), (8, 12), (12, 16))
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.one(self.stem(x)))).mean((2, 3)))


def build(target: nn.Module, images: Tensor = IMAGES, plan: dict | None = None, **settings: object) -> Oemc:
    torch.manual_seed(0)
    branches = Oemc.plan(inspect(target, images), **(plan or {}))
    return Oemc(Cohort(target, images, branches, taps=Oemc.taps), **settings)


def inputs() -> tuple[Oemc, CohortOutput, dict[str, Tensor], dict]:
    """The golden file as what a cohort of three says, with its adaptation layers in place."""
    t, meta = load("oemc_loss")
    oemc = build(ThreeStages(), plan={"members": 3}).double()
    assert oemc.cohort.stage_widths == tuple(map(tuple, meta["channels"]))
    for s in (1, 2):
        for b in range(3):
            for kind in ("weight", "bias"):
                oemc.adapt[s - 1][b].get_parameter(kind).data = t[f"adapt_s{s}_b{b}_{kind}"].clone()
    logits = tuple(t[f"z_s{s}"].requires_grad_() for s in range(3))
    maps = tuple(tuple(t[f"feat_s{s}_b{b}"].requires_grad_() for b in range(3)) for s in range(3))
    return oemc, CohortOutput(logits, stage_maps=maps), t, meta


def test_losses_and_gradients() -> None:
    oemc, out, t, meta = inputs()
    settings = (oemc.alpha, oemc.beta, oemc.gamma, oemc.temperature)
    assert settings == (meta["alpha"], meta["beta"], meta["gamma"], meta["T"]), "the paper's are the defaults"
    expected = meta["components"]
    parts = oemc.losses(out, t["labels"])
    for s, name in enumerate(oemc.cohort.names):
        assert_same(parts[f"ce/{name}"], meta["alpha"] * expected["ce"][s])
        assert_same(parts[f"kd/{name}"], meta["gamma"] * expected["kl"][s])
    for s, fits in enumerate(oemc.map_losses(out.stage_maps), start=1):
        for b, fit in enumerate(fits):
            assert_same(fit, expected["mse"][f"s{s}_b{b}"])
            assert_same(oemc.adapt[s - 1][b](out.stage_maps[s][b]), t[f"adapted_s{s}_b{b}"])
    for kind, key, weight in (("ce", "normal", "alpha"), ("map", "intermediate", "beta"), ("kd", "kd", "gamma")):
        total = sum(value for name, value in parts.items() if name.startswith(f"{kind}/"))
        assert_same(total, meta[weight] * expected[f"loss_{key}"])
    assert_same(oemc.ensemble(out), t["z_ensemble"])
    total = sum(parts.values())
    assert_same(total, meta["total"])
    total.backward()
    for s in range(3):
        assert_same(out.logits[s].grad, t[f"dz_s{s}"])
        for b in range(3):
            if s == 0:
                assert out.stage_maps[0][b].grad is None, "the target's maps are constants"
                continue
            assert_same(out.stage_maps[s][b].grad, t[f"dfeat_s{s}_b{b}"])
            for kind in ("weight", "bias"):
                assert_same(oemc.adapt[s - 1][b].get_parameter(kind).grad, t[f"d_adapt_s{s}_b{b}_{kind}"])


def test_means_instead_of_sums_and_the_papers_formula_without_t_squared() -> None:
    oemc, out, t, meta = inputs()
    expected = meta["components"]
    oemc.reduce, oemc.t_squared = "mean", False
    parts = oemc.losses(out, t["labels"])
    for kind, weight, total, terms in (
        ("ce", 0.7, expected["loss_normal"], 3),
        ("map", 0.15, expected["loss_intermediate"], 6),
        ("kd", 0.15 / 4, expected["loss_kd"], 3),
    ):
        got = sum(value for name, value in parts.items() if name.startswith(f"{kind}/"))
        assert_same(got, weight * total / terms)


def channels(network: nn.Module) -> list[int]:
    """The distinct widths that follow each other in a network's convolutions."""
    widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    return [w for i, w in enumerate(widths) if i == 0 or w != widths[i - 1]]


def test_widths() -> None:
    _, meta = load("oemc_widths")
    for case, make, cut in zip(
        meta["resnet"],
        (lambda: timm.create_model("resnet20_cifar"),) * 2 + (lambda: Tiny(width=64),),
        ("stem", "stem", None),
        strict=True,
    ):
        students = case["S"]
        target = make()
        plan = Oemc.plan(inspect(target, IMAGES), members=students, share=None if cut else "none")
        assert [b.cut for b in plan] == [cut] * (students - 1)
        cohort = Cohort(target, IMAGES, plan)
        for i, expected in enumerate(case["per_student"]):
            private = channels(cohort.extract(i))
            if cut and i > 0:
                assert private.pop(0) == case["base"][0], "the stem is the target's"
            assert private == expected
    for case in meta["effnet"]:
        plan = Oemc.plan(inspect(Tiny(), IMAGES), members=case["S"])
        got = torch.tensor([case["base"] * w for w in (1.0, *(b.width for b in plan))])
        assert_same(got, torch.tensor(case["per_student"]), 1e-7)
    for case in meta["densenet"]:  # a growth rate is truncated like any number of channels
        target = nn.Sequential(conv(3, 8), conv(8, case["base"]), nn.Flatten(), nn.Linear(case["base"] * 1024, 4))
        cohort = Cohort(target, IMAGES, Oemc.plan(inspect(target, IMAGES), members=case["S"]))
        assert [channels(cohort.extract(i))[-1] for i in range(case["S"])] == case["per_student"]


def test_parameters_of_the_papers_students() -> None:
    target = timm.create_model("resnet20_cifar", num_classes=10)
    oemc = build(target)
    students = {"": oemc.cohort.extract(0), **oemc.byproducts()}
    assert list(students) == ["", "width-0.8", "width-0.6", "width-0.4", "width-0.2"]
    counts = [sum(p.numel() for p in network.parameters()) for network in students.values()]
    assert counts == [272_474, 171_536, 97_018, 42_231, 10_773]
    assert sum(p.numel() for p in oemc.cohort.parameters()) == 592_176
    assert oemc.cohort.grown == ["width 0.8", "width 0.6", "width 0.4", "width 0.2"]


def test_students_leave_the_training_unharmed_and_learn_nothing_more() -> None:
    oemc = build(Tiny(), plan={"members": 3})
    optimizer = torch.optim.SGD(oemc.param_groups(0.1), lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    labels = torch.tensor([0, 1])
    twin = copy.deepcopy(oemc)
    students = oemc.byproducts()
    for method in (oemc, twin):
        torch.manual_seed(1)
        sum(method.train()(IMAGES, labels).values()).backward()
    for mine, theirs in zip(oemc.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    before = {name: network.eval()(IMAGES) for name, network in students.items()}
    optimizer.step()
    for name, network in students.items():
        assert torch.equal(network(IMAGES), before[name])
    assert [name for name, network in students.items() if any(p.grad is not None for p in network.parameters())] == []


def test_the_default_cut_is_the_stem() -> None:
    for network, images, expected in [
        (timm.create_model("resnet18", num_classes=4), torch.randn(2, 3, 64, 64), "maxpool"),
        (timm.create_model("mobilenetv3_small_100", num_classes=4), torch.randn(2, 3, 64, 64), "bn1"),
        (Tiny(), IMAGES, "stem"),
        (Tokens(), IMAGES, "patch"),
    ]:
        anatomy = inspect(network, images)
        assert stem(anatomy) == expected
        assert {branch.cut for branch in Oemc.plan(anatomy)} == {expected}
    assert {branch.cut for branch in Oemc.plan(inspect(Tiny(), IMAGES), private_stages=1)} == {"early"}


def test_ratios() -> None:
    anatomy = inspect(Tiny(), IMAGES)
    assert [b.width for b in Oemc.plan(anatomy)] == [4 / 5, 3 / 5, 2 / 5, 1 / 5]
    oemc = build(Tiny(), plan={"ratios": [1, 1, 0.5, 0.5]}, ratios=[1, 1, 0.5, 0.5])
    assert list(oemc.byproducts()) == ["width-1", "width-0.5", "width-0.5-branch3"]
    for ratios, members in (([0.8, 0.4], None), ([1, 0], None), ([1, 1.5], None), ([1, 0.5], 3)):
        with pytest.raises(RecipeError, match=r"expected one per member.*such as \[1, 0.8"):
            Oemc.plan(anatomy, ratios=ratios, members=members)
    with pytest.raises(RecipeError, match="are not the cohort's widths"):
        build(Tiny(), plan={"members": 2}, ratios=[1, 0.4])


def test_peers_of_other_architectures_are_compared_on_one_grid() -> None:
    oemc = build(Tiny(), plan={"peers": [Tiny(width=5)]})
    assert oemc.cohort.widths == (1.0, 1.0)
    assert all(torch.isfinite(part) for part in oemc.train()(IMAGES, torch.tensor([0, 1])).values())
    narrow = ThreeStages()
    narrow.head = nn.Linear(16, 4)
    with pytest.raises(RecipeError, match="stage by stage"):
        build(Tiny(), plan={"peers": [narrow, Tokens()]})


def test_branches_that_are_planned_by_hand() -> None:
    cohort = Cohort(Tiny(), IMAGES, [Branch("early", (1,), width=0.5)], taps=Oemc.taps)
    assert cohort.grown == ["1 x Conv2d-BatchNorm2d-ReLU after late.2, width 0.5"]
    assert Oemc(cohort).cohort.stage_widths == ((32,), (16,))


def test_every_student_of_a_training_comes_back(tmp_path: Path) -> None:
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 4
    loader = DataLoader(TensorDataset(images, labels), 16)
    result = okdc.compress(
        Tiny(), loader, loader, method="oemc", method_kwargs={"ratios": [1, 0.5]}, epochs=1, lr=0.01,
        onnx=False, torch=False, output=tmp_path,
    )  # fmt: skip
    assert list(result.byproducts) == ["width-0.5"]
    student = result.byproducts["width-0.5"]
    assert student.head.in_features == 16 and student(images).shape == (32, 4)
    torch.testing.assert_close(student.stem[0].weight, result.student.stem[0].weight)
    with pytest.raises(RecipeError, match="expected one per member"):
        okdc.compress(Tiny(), loader, loader, method="oemc", method_kwargs={"ratios": [0.5]}, output=tmp_path)
