"""SOKD against the numbers of the authors' own code (tests/golden/sokd_*), in float64; its bridge and its teacher."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import okdc.networks
from okdc.cohort import Cohort, CohortOutput
from okdc.errors import RecipeError
from okdc.losses import attention_transfer, feature_mse, similarity
from okdc.methods import settings
from okdc.methods.sokd import Sokd
from tests.helpers.networks import Depthwise, Tiny, Tokens
from tests.methods.golden import assert_same, load


def method(teacher: nn.Module | None = None, target: nn.Module | None = None, **given: object) -> Sokd:
    cohort = Cohort(target or Tiny(), torch.randn(2, 3, 32, 32), taps=Sokd.taps)
    return Sokd(cohort, teacher or Tiny(width=6), **given)


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.arange(size) % 4


def steps(sokd: Sokd, count: int = 3) -> None:
    optimizer = torch.optim.SGD(sokd.param_groups(0.05), momentum=0.9)
    for _ in range(count):
        optimizer.zero_grad()
        sum(sokd.train()(*batch()).values()).backward()
        optimizer.step()


def wide(state: dict[str, Tensor], prefix: str) -> nn.Module:
    """WRN-10-1 of okdc's own blocks, with the authors' weights; a teacher's tail may come from its bridge."""
    network = okdc.networks.cifar._wide_resnet(10, 1, num_classes=5).double()
    theirs = {"stem": "conv1", "norm": "bn1", "fc": "fc"}
    for i in range(3):
        for mine, name in {"norm1": "bn1", "norm2": "bn2", "conv1": "conv1", "conv2": "conv2"}.items():
            theirs[f"stages.{i}.blocks.0.{mine}"] = f"stage{i + 1}.{name}"
        theirs[f"stages.{i}.blocks.0.downsample.conv"] = f"stage{i + 1}.convShortcut"
    bridge = {"stage3": "kbm.block", "bn1": "kbm.bn_final", "fc": "kbm.fc"}
    own = network.state_dict()
    for key in own:
        module, _, leaf = key.rpartition(".")
        name = theirs[module]
        first, _, rest = name.partition(".")
        if prefix == "bridge":
            name = ".".join(filter(None, (bridge.get(first, first), rest)))
        if leaf != "num_batches_tracked":
            own[key] = state[f"{'teacher' if prefix == 'bridge' else prefix}.{name}.{leaf}"]
    network.load_state_dict(own)
    return network


def test_losses_and_gradients() -> None:
    t, meta = load("sokd_losses")
    hyper, expected = meta["hyper"], meta["expected"]
    sokd = method()
    assert (sokd.temperature, sokd.ce_weight, sokd.kd_weight, sokd.bridge_ce_weight) == (hyper["T"], 1, 1, 1)
    target, bridge, teacher = (t[f"z_{k}"].requires_grad_() for k in ("student", "kbm", "teacher"))
    parts = sokd.mutual_losses(CohortOutput((target,)), CohortOutput((teacher, bridge)), t["y"])
    names = {
        "ce/target": "ce_student", "kd/target": "kd_student_from_kbm", "ce/bridge": "ce_kbm",
        "kd/bridge_from_teacher": "kd_kbm_from_teacher", "kd/bridge_from_target": "kd_kbm_from_student",
    }  # fmt: skip
    assert set(parts) == set(names)
    for key, value in parts.items():
        assert_same(value, expected[names[key]])
    assert_same(parts["ce/target"] + parts["kd/target"], expected["loss_student"])
    assert_same(sum(v for k, v in parts.items() if "bridge" in k), expected["loss_kbm"])
    total = sum(parts.values())
    assert_same(total, expected["loss_total"])
    total.backward()
    assert_same(target.grad, t["grad_z_student"])
    assert_same(bridge.grad, t["grad_z_kbm"])
    assert teacher.grad is None


def test_the_bridge_forward() -> None:
    """The re-grown tail of a Wide ResNet is the authors' module, running statistics included."""
    t, _ = load("sokd_kbm")
    teacher = okdc.networks.cifar._wide_resnet(10, 1, num_classes=5)
    target = okdc.networks.cifar._wide_resnet(10, 1, num_classes=5)
    bridge = method(teacher, target).double().bridge
    assert bridge.cut == "stages.1"
    tail = bridge.branches[0]
    names = {"norm": "bn_final", "fc": "fc"} | {
        f"stages.2.blocks.0.{mine}": f"block.{theirs}"
        for mine, theirs in {
            "norm1": "bn1", "norm2": "bn2", "conv1": "conv1", "conv2": "conv2", "downsample.conv": "convShortcut",
        }.items()
    }  # fmt: skip
    own = tail.state_dict()
    for key in own:
        module, _, leaf = key.rpartition(".")
        if leaf != "num_batches_tracked":
            own[key] = t[f"kbm.{names[module]}.{leaf}"]
    tail.load_state_dict(own)
    trunk = bridge.tape.outputs  # the authors' input in place of what the trunk would say
    features, pooled = t["feat_in"], []
    tail.global_pool.register_forward_hook(lambda _, __, output: pooled.append(output))
    for mode in ("eval", "train"):
        tail.train(mode == "train")
        bridge.tape.start()
        trunk = bridge.tape.outputs
        for name in bridge.tape.handling:
            trunk[name] = [features]
        logits = tail(torch.zeros(len(features), 3, 32, 32, dtype=torch.float64))
        bridge.tape.clear()
        assert_same(pooled[-1], t[f"pooled_{mode}"])
        assert_same(logits, t[f"logits_{mode}"])
    after = {key: value for key, value in tail.state_dict().items() if "running" in key}
    assert len(after) == 6
    for key, value in after.items():
        module, _, leaf = key.rpartition(".")
        assert_same(value, t[f"after_train.kbm.{names[module]}.{leaf}"])


def test_whole_iterations() -> None:
    t, meta = load("sokd_step")
    hyper = meta["hyper"]
    teacher, target = wide(t, "teacher"), wide(t, "student")
    before = copy.deepcopy(teacher.state_dict())
    cohort = Cohort(target, torch.randn(2, 3, 32, 32).double(), taps=Sokd.taps)
    share = hyper["lr_kbm"] / hyper["lr_student"]
    sokd = Sokd(cohort, teacher, teacher_mode="train", bridge_lr=share).double()
    tail = sokd.bridge.branches[0]
    tail.load_state_dict({k: v for k, v in wide(t, "bridge").state_dict().items() if k in tail.state_dict()})
    optimizer = torch.optim.SGD(
        sokd.param_groups(hyper["lr_student"]), momentum=hyper["momentum"], weight_decay=hyper["weight_decay"]
    )
    for images, labels, expected in zip(t["x"], t["y"], meta["expected"]["loss_total_per_step"], strict=True):
        total = sum(sokd.train()(images, labels).values())
        assert_same(total, expected)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    sokd.eval()
    taught = sokd.bridge(t["probe"]).logits
    assert_same(sokd.cohort(t["probe"]).logits[0], t["probe_logits_student"])
    assert_same(taught[0], t["probe_logits_teacher"])
    assert_same(taught[1], t["probe_logits_kbm"])
    for kind in ("running_mean", "running_var"):
        assert_same(teacher.norm.get_buffer(kind), t[f"after.teacher.bn1.{kind}"])
    assert all(torch.equal(p, before[key]) for key, p in teacher.named_parameters())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_teacher_is_frozen_and_its_statistics_move_only_in_training_mode(mode: str) -> None:
    teacher = Tiny(width=6)
    sokd = method(teacher, teacher_mode=mode)
    before = copy.deepcopy(teacher.state_dict())
    steps(sokd)
    moved = [key for key, value in teacher.state_dict().items() if not torch.equal(value, before[key])]
    assert all("running" in key or "num_batches" in key for key in moved) and bool(moved) == (mode == "train")
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert sokd.training and sokd.bridge.branches[0].training and teacher.training == (mode == "train")
    resumed = method(Tiny(width=6), teacher_mode=mode)
    resumed.load_state_dict(sokd.state_dict())
    for part in (sokd, resumed):
        torch.manual_seed(0)
        part.train()
    torch.testing.assert_close(resumed(*batch()), sokd(*batch()), rtol=0, atol=0)
    assert not sokd.eval().bridge.target.training


def test_who_learns_what() -> None:
    sokd = method(bridge_lr=0.5)
    parts = sokd(*batch())
    target, bridge = list(sokd.cohort.parameters()), [p for p in sokd.bridge.parameters() if p.requires_grad]
    tail = {id(p) for name in ("late", "head") for p in sokd.bridge.branches[0].get_submodule(name).parameters()}
    assert {id(p) for p in bridge} == tail
    for name, value in parts.items():
        learns, rests = (target, bridge) if name.endswith("/target") else (bridge, target)
        grads = torch.autograd.grad(value, [*learns, *rests], retain_graph=True, allow_unused=True)
        assert all(g is not None for g in grads[: len(learns)]) and not any(
            g is not None for g in grads[len(learns) :]
        ), name
    groups = sokd.param_groups(0.1)
    assert [g["lr"] for g in groups] == [0.1, 0.05] and {id(p) for p in groups[1]["params"]} == tail


@pytest.mark.parametrize("name", ["resnet20_cifar", "wrn_16_1_cifar", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_a_random_bridge_is_as_an_untrained_network(name: str) -> None:
    """A trained teacher's weights leave no trace; a network with its own way to draw them has used it."""
    size = {"img_size": 32} if "vit" in name else {}
    make = lambda: timm.create_model(name, num_classes=4, **size)  # noqa: E731
    teacher, new = make(), make()
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(1.5).add_(0.3)
    tail = method(teacher).bridge.branches[0]
    for key, p in tail.named_parameters():
        if p.requires_grad and p.ndim > 1 and p.numel() > 500:
            spread = new.get_parameter(key).std()
            assert 1e-3 < p.std() < 0.5 and p.mean().abs() < 0.2, key
            assert abs(p.std() - spread) < 0.2 * spread or not hasattr(teacher, "init_weights"), key
    for key, value in tail.named_buffers():
        torch.testing.assert_close(value, new.get_buffer(key))


def test_a_bridge_of_the_teachers_own_weights_starts_as_the_teacher() -> None:
    sokd = method(bridge_init="teacher").eval()
    out = sokd.bridge(batch()[0])
    torch.testing.assert_close(out.logits[0], out.logits[1])
    assert sokd(*batch())["kd/bridge_from_teacher"] < 1e-6
    steps(sokd)
    assert sokd.eval()(*batch())["kd/bridge_from_teacher"] > 1e-6


def test_depth_of_the_bridge() -> None:
    teacher = timm.create_model("resnet20_cifar", num_classes=4)
    cuts = [method(copy.deepcopy(teacher), bridge_depth=n).bridge.cut for n in (1, 2)]
    assert cuts == ["stages.1", "stages.0"]
    with pytest.raises(RecipeError, match="bridge_depth is 0: expected 1"):
        method(bridge_depth=0)


@pytest.mark.parametrize("distance", ["at", "fitnet", "sp"])
@pytest.mark.parametrize("teacher", [lambda: Tiny(width=6), Depthwise, Tokens])
def test_distances_of_feature_maps(distance: str, teacher: type[nn.Module]) -> None:
    torch.manual_seed(0)
    sokd = method(teacher(), distance=distance).train()
    parts = sokd(*batch())
    assert all(torch.isfinite(v) and v > 0 for v in parts.values())
    adapter, bridge = list(sokd.adapter.parameters()), [p for p in sokd.bridge.parameters() if p.requires_grad]
    assert bool(adapter) == (distance == "fitnet")
    own = (*adapter, *sokd.cohort.parameters())
    for name in ("kd/bridge_from_teacher", "kd/bridge_from_target"):
        assert not any(
            g is not None for g in torch.autograd.grad(parts[name], own, retain_graph=True, allow_unused=True)
        )
    grads = torch.autograd.grad(parts["kd/target"], [*own, *bridge], allow_unused=True)
    assert all(g is not None for g in grads[: len(adapter)]) and not any(g is not None for g in grads[len(own) :])
    steps(sokd)
    keys = list(sokd.cohort.target.state_dict())
    assert sokd.strip() is sokd.cohort.target and list(sokd.cohort.target.state_dict()) == keys == list(
        Tiny().state_dict()
    )


def test_the_distances_themselves() -> None:
    a, b = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64).unbind()
    focus = [(x**2).mean(1).flatten(1) for x in (a, b)]
    focus = [x / x.norm(dim=1, keepdim=True) for x in focus]
    assert_same(attention_transfer(a, b), (focus[0] - focus[1]).square().mean())
    gram = [x.flatten(1) @ x.flatten(1).T for x in (a, b)]
    gram = [g / g.norm(dim=1, keepdim=True) for g in gram]
    assert_same(similarity(a, b), (gram[0] - gram[1]).square().sum() / 25)
    assert_same(feature_mse(a, b), (a - b).square().mean())
    leaves = a.requires_grad_(), b.requires_grad_()
    (attention_transfer(*leaves) + similarity(*leaves) + feature_mse(*leaves)).backward()
    assert a.grad is not None and b.grad is None


@pytest.mark.parametrize("make", [lambda: Tiny(width=6), Tokens, lambda: timm.create_model("resnet20_cifar")])
def test_the_bridge_is_a_network_of_the_teachers_architecture(make: type[nn.Module]) -> None:
    teacher = make()
    labels = next(iter(teacher.state_dict()))
    target = timm.create_model("resnet20_cifar") if hasattr(teacher, "num_classes") else Tiny()
    sokd = method(teacher, target)
    steps(sokd)
    images = batch()[0]
    expected = sokd.eval().bridge(images).logits[1]
    network = sokd.byproducts()["bridge"].eval()
    assert type(network) is type(teacher) and list(network.state_dict()) == list(teacher.state_dict()), labels
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    plain = make()
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(plain.eval()(images), expected)
    sokd.strip()
    torch.testing.assert_close(network(images), expected)
    assert not {id(p) for p in network.parameters()} & {id(p) for p in sokd.parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_the_step_compiles_to_one_graph() -> None:
    sokd = method()
    compiled = torch.compile(sokd, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch()), sokd(*batch()))
    torch._dynamo.reset()


def test_settings() -> None:
    assert list(settings("sokd").parameters) == [
        "temperature", "ce_weight", "kd_weight", "bridge_ce_weight", "bridge_teacher_weight", "bridge_target_weight",
        "distance", "bridge_depth", "bridge_init", "bridge_lr", "teacher_mode",
    ]  # fmt: skip
