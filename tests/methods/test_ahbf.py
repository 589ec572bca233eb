"""AHBF against the numbers of the authors' own code (tests/golden/ahbf_*), in float64."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import okdc
from okdc.anatomy import inspect
from okdc.cohort import Branch, Cohort, CohortOutput
from okdc.losses import kl, rampup
from okdc.methods import get
from okdc.methods.ahbf import Ahbf, Fusion
from tests.helpers.networks import Depthwise, Tiny
from tests.methods.golden import assert_same, load

NAMES = {"conv": "fusion.conv", "bn": "fusion.bn", "gate_fc": "gate.fc", "gate_bn": "gate.bn"}


def method(members: int, **settings: object) -> Ahbf:
    branches = [Branch("early") for _ in range(members - 1)]
    return Ahbf(Cohort(Tiny(), torch.randn(2, 3, 32, 32), branches, taps=Ahbf.taps), **settings).double()


def fill(module: nn.Module, tensors: dict[str, Tensor], prefix: str, names: dict[str, str] = NAMES) -> nn.Module:
    for own, golden in names.items():
        for kind in ("weight", "bias"):
            if f"{prefix}{golden}.{kind}" in tensors:
                parameter = module.get_parameter(f"{own}.{kind}")
                parameter.data = tensors[f"{prefix}{golden}.{kind}"].reshape(parameter.shape).clone()
    return module


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("mode", ["nodetach", "detach"])
def test_losses_and_gradients(row: int, mode: str) -> None:
    t, meta = load("ahbf_losses")
    hyper = meta["hyper"]
    branches = [t[f"logits.{i}"].requires_grad_() for i in range(4)]
    fused = [t[f"fused.{i}"].requires_grad_() for i in range(3)]
    ahbf = method(4, rampup_epochs=300, detach_teacher=mode == "detach")
    ahbf.epoch.fill_(hyper["epochs"][row])
    parts = ahbf.chain_losses(branches, [branches[0], *fused], t["labels"])
    ce = sum(v for k, v in parts.items() if k.startswith("ce/"))
    expected = meta["expected"]
    assert_same(ce, expected[f"r{row}.ce"])
    assert_same(parts["kd/assistant"], expected[f"r{row}.ekd"])
    assert_same(parts["kd/branch"], expected[f"r{row}.dkd"])
    total = sum(parts.values())
    assert_same(total, expected[f"r{row}.total"])
    for key, got in {"ce": ce, "ekd": parts["kd/assistant"], "dkd": parts["kd/branch"], "total": total}.items():
        assert_same(got, t[f"expected.loss.r{row}.{key}"])
    assert_same(ahbf.epoch, t["ramp.epoch"][row])
    assert_same(rampup(ahbf.epoch, 300), t["ramp.weight"][row])
    total.backward()
    for i, leaf in enumerate(branches):
        assert_same(leaf.grad, t[f"expected.grad.r{row}.{mode}.logits.{i}"])
    for i, leaf in enumerate(fused):
        assert_same(leaf.grad, t[f"expected.grad.r{row}.{mode}.fused.{i}"])


def test_exact_divergence_and_single_terms() -> None:
    t, meta = load("ahbf_losses")
    branches, fused = [t[f"logits.{i}"] for i in range(4)], [t[f"fused.{i}"] for i in range(3)]
    ahbf = method(4, rampup_epochs=300, eps=0.0)
    for row, epoch in enumerate(meta["hyper"]["epochs"]):
        ahbf.epoch.fill_(epoch)
        parts = ahbf.chain_losses(branches, [branches[0], *fused], t["labels"])
        got = {"ekd": parts["kd/assistant"], "dkd": parts["kd/branch"], "total": sum(parts.values())}
        got["ce"] = sum(v for k, v in parts.items() if k.startswith("ce/"))
        for key, value in got.items():
            assert_same(value, meta["expected"][f"r{row}.eps0.{key}"])
            assert_same(value, t[f"expected.loss.r{row}.eps0.{key}"])
    for i in range(4):
        assert_same(parts[f"ce/{ahbf.cohort.names[i]}"], t["expected.ce.branch"][i])
    for i in range(3):
        now = branches[0] if i == 0 else fused[i - 1]
        assert_same(parts[f"ce/assistant{i + 1}"], t["expected.ce.fused"][i])
        assert_same(kl(now, fused[i], 3.0, eps=1e-7), t["expected.kd.ta_from_ta"][i])
        assert_same(kl(branches[i + 1], fused[i], 3.0, eps=1e-7), t["expected.kd.branch_from_ta"][i])
        assert_same(kl(now, branches[i + 1], 3.0, eps=1e-7), t["expected.kd.ta_from_branch"][i])


def test_fusion_module() -> None:
    t, meta = load("ahbf_fusion")
    fusion = fill(Fusion(8, 8).double(), t, "").train()
    inputs = [t[k].requires_grad_() for k in ("feat_ta", "logits_ta", "feat_branch", "logits_branch")]
    feature, logits = fusion((inputs[0], inputs[1]), (inputs[2], inputs[3]))
    assert_same(feature, t["expected.train.feat"])
    assert_same(logits, t["expected.train.logits"])
    total = (logits * t["cot.logits"]).sum() + (feature * t["cot.feat"]).sum()
    assert_same(total, meta["expected"]["cotangent_sum"])
    total.backward()
    for key, leaf in zip(("feat_ta", "logits_ta", "feat_branch", "logits_branch"), inputs, strict=True):
        assert_same(leaf.grad, t[f"expected.grad.{key}"])
    for own, golden in NAMES.items():
        for kind in ("weight", "bias"):
            grad = fusion.get_parameter(f"{own}.{kind}").grad
            expected = t[f"expected.grad.{golden}.{kind}"]
            if own in ("conv", "gate_fc") and kind == "bias":  # a bias before a batch norm: exactly zero up to rounding
                assert grad.abs().max() < 1e-12 and expected.abs().max() < 1e-12
            else:
                assert_same(grad, expected.reshape(grad.shape))
    for kind in ("mean", "var"):
        assert_same(fusion.bn.get_buffer(f"running_{kind}"), t[f"expected.buffers.fusion.bn.running_{kind}"])
        assert_same(fusion.gate_bn.get_buffer(f"running_{kind}"), t[f"expected.buffers.gate.bn.running_{kind}"])
    assert_same(copy.deepcopy(fusion).gate(feature), t["expected.train.gate"])
    fusion.eval()
    feature, logits = fusion((inputs[0], inputs[1]), (inputs[2], inputs[3]))
    assert_same(fusion.gate(feature), t["expected.eval.gate"])
    assert_same(feature, t["expected.eval.feat"])
    assert_same(logits, t["expected.eval.logits"])


def test_fusion_of_unequal_widths() -> None:
    t, _ = load("ahbf_fusion_asym")
    fusion = fill(Fusion(8, 14).double(), t, "").train()
    feature, logits = fusion((t["feat_ta"], t["logits_ta"]), (t["feat_branch"], t["logits_branch"]))
    assert_same(fusion.gate(feature), t["expected.train.gate"])
    assert_same(feature, t["expected.train.feat"])
    assert_same(logits, t["expected.train.logits"])


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("se", {"attention.fc1": "se.reduce", "attention.fc2": "se.expand"}),
        (
            "cbam",
            {
                "attention.0.fc1": "cbam.channel.reduce",
                "attention.0.fc2": "cbam.channel.expand",
                "attention.1.conv": "cbam.spatial.conv",
            },
        ),
    ],
)
def test_fusion_with_attention(kind: str, names: dict[str, str]) -> None:
    t, _ = load("ahbf_fusion_variants")
    fusion = fill(Fusion(64, 64, kind).double(), t, f"{kind}/", NAMES | names).train()
    feature, logits = fusion((t["feat_ta"], t["logits_ta"]), (t["feat_branch"], t["logits_branch"]))
    assert_same(feature, t[f"expected.{kind}.feat"])
    assert_same(logits, t[f"expected.{kind}.logits"])


def test_chain_end_to_end() -> None:
    t, meta = load("ahbf_chain")
    hyper, expected = meta["hyper"], meta["expected"]
    ahbf = method(4, rampup_epochs=300)
    for i in range(3):
        ahbf.fusions[i] = fill(Fusion(64, 64).double(), t, f"fusion.{i}.", {k: k.replace("_", ".") for k in NAMES})
    ahbf.train().epoch.fill_(hyper["epoch"])
    maps = [t[f"feat.{i}"].requires_grad_() for i in range(4)]
    logits = [maps[i].mean((2, 3)) @ t[f"classifier.{i}.weight"].T + t[f"classifier.{i}.bias"] for i in range(4)]
    for z in logits:
        z.retain_grad()
    out = CohortOutput(tuple(logits), tuple(maps))
    assistants = ahbf.assistants(out)
    for z in assistants[1:]:
        z.retain_grad()
    for i in range(4):
        assert_same(logits[i], t[f"expected.logits.{i}"])
    for i in range(3):
        assert_same(assistants[i + 1], t[f"expected.fused.{i}"])
    parts = ahbf.chain_losses(logits, assistants, t["labels"])
    assert_same(sum(v for k, v in parts.items() if k.startswith("ce/")), expected["ce"])
    assert_same(rampup(ahbf.epoch, 300), expected["ramp_weight"])
    assert_same(parts["kd/assistant"], expected["ekd"])
    assert_same(parts["kd/branch"], expected["dkd"])
    total = sum(parts.values())
    assert_same(total, expected["total"])
    total.backward()
    for i in range(4):
        assert_same(maps[i].grad, t[f"expected.grad.feat.{i}"])
        assert_same(logits[i].grad, t[f"expected.grad.logits.{i}"])
    for i in range(3):
        assert_same(assistants[i + 1].grad, t[f"expected.grad.fused.{i}"])
        bias = ahbf.fusions[i].gate_fc.bias.grad, t[f"expected.grad.fusion.{i}.gate.fc.bias"]
        assert max(x.abs().max() for x in bias) < 1e-12  # before a batch norm: exactly zero up to rounding
        assert_same(ahbf.fusions[i].gate_fc.weight.grad, t[f"expected.grad.fusion.{i}.gate.fc.weight"])
        assert_same(ahbf.fusions[i].gate_bn.weight.grad, t[f"expected.grad.fusion.{i}.gate.bn.weight"])
        assert_same(ahbf.fusions[i].gate_bn.bias.grad, t[f"expected.grad.fusion.{i}.gate.bn.bias"])


def test_rampup() -> None:
    t, meta = load("ahbf_rampup")
    for tag, length, scale in meta["hyper"]["schedules"]:
        got = torch.stack([scale * rampup(e.double(), length) for e in t[f"{tag}.epoch"]])
        assert_same(got, t[f"{tag}.weight"])
    # Today's code: half the ramp of 240 epochs, times a weight of 1.5; its settings can still be given one by one.
    head = method(2, preset="head")
    got = torch.stack([head.kd_weight * rampup(e.double(), head.rampup_epochs) for e in t["head_len240_half.epoch"]])
    assert_same(got, 1.5 * t["head_len240_half.weight"])
    assert method(2, preset="head", kd_weight=1.0).kd_weight == 1.0 and method(2).kd_weight == 1.0
    assert method(2).rampup_epochs is None and method(2, preset="head", rampup_epochs=9).rampup_epochs == 9


def test_depth_rule_on_every_architecture_of_the_paper() -> None:
    t, meta = load("ahbf_structure")
    assert len(meta["expected"]) == 10
    for key, expected in meta["expected"].items():
        for kind in ("blocks", "branch_params", "fusion_params"):
            assert t[f"{key}.{kind}"].tolist() == expected[kind]
        assert t[f"{key}.totals"].tolist() == [expected[kind] for kind in ("train_total", "trunk", "deployed")]
        extra = int(key.split("_a")[-1].split("_")[0])
        base = expected["blocks"][0]
        for i, blocks in enumerate(expected["blocks"]):
            grown = Ahbf.depth(i, len(base), extra)
            assert [b + g for b, g in zip(base, grown, strict=True)] == blocks, key


@pytest.mark.parametrize(
    ("key", "name", "size", "members", "extra", "classes"),
    [
        ("resnet18_M4_a2_K1000", "resnet18", 64, 4, 2, 1000),
        ("resnet18_M3_a1_K10", "resnet18", 64, 3, 1, 10),
        ("resnet34_M4_a1_K1000", "resnet34", 64, 4, 1, 1000),
        ("resnet50_M2_a1_K1000", "resnet50", 64, 2, 1, 1000),
        ("cifar_resnet32_M4_a4_K100", "resnet32_cifar", 32, 4, 4, 100),
        ("cifar_resnet32_M4_a2_K10", "resnet32_cifar", 32, 4, 2, 10),
        ("cifar_resnet110_M4_a4_K100", "resnet110_bottleneck_cifar", 32, 4, 4, 100),
        ("cifar_vgg16_M4_a4_K100", "vgg16_cifar", 32, 4, 4, 100),
    ],
)
def test_parameters_of_what_is_built(key: str, name: str, size: int, members: int, extra: int, classes: int) -> None:
    import okdc.networks  # noqa: F401 (registers the CIFAR networks)

    expected = load("ahbf_structure")[1]["expected"][key]
    target = timm.create_model(name, num_classes=classes)
    images = torch.randn(2, 3, size, size)
    plan = Ahbf.plan(inspect(target, images), members=members, extra_blocks=extra)
    cohort = Cohort(target, images, plan, taps=Ahbf.taps)
    ahbf = get("ahbf")(cohort)
    assert [c.own_params for c in cohort.costs[1:]] == expected["branch_params"][1:]
    assert [sum(p.numel() for p in f.parameters()) for f in ahbf.fusions] == expected["fusion_params"]
    assert cohort.costs[0].params == expected["deployed"] == expected["trunk"] + expected["branch_params"][0]
    assert sum(p.numel() for p in ahbf.parameters()) == expected["train_total"]


def test_presets_are_the_authors_forms_and_a_cheaper_one() -> None:
    """okdc's own merges at the width of the last block of half a MobileNetV2, 80, and not at its head's 1280."""
    images, target = torch.randn(2, 3, 32, 32), timm.create_model("mobilenetv2_050", num_classes=4)
    for preset, more in {"okdc": 1, "release": 4, "head": 2}.items():
        plan = Ahbf.plan(inspect(target, images), members=3, preset=preset)
        assert [sum(branch.extra_blocks) for branch in plan] == [more, 2 * more]
    release = okdc.build(copy.deepcopy(target), images, "ahbf", members=3, preset="release")
    own = okdc.build(target, images, "ahbf", members=3)
    assert [tuple(f.conv.weight.shape[:2]) for f in release.fusions] == [(1280, 2560)] * 2
    assert [tuple(f.conv.weight.shape[:2]) for f in own.fusions] == [(80, 2560), (80, 1360)]
    parts = own(torch.randn(4, 3, 32, 32), torch.arange(4))
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in own.parameters())


def test_peers_whose_maps_are_of_other_sizes_are_fused_on_the_smallest() -> None:
    torch.manual_seed(0)
    peers = [Branch(network=Tiny()), Branch(network=Depthwise())]
    ahbf = get("ahbf")(Cohort(Tiny(), torch.randn(2, 3, 32, 32), peers, taps=Ahbf.taps))
    parts = ahbf(torch.randn(4, 3, 32, 32), torch.arange(4))
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in ahbf.parameters())
