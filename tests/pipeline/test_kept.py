"""The student ends as the user's own object with what it had: parametrizations, frozen weights, buffers, formats."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import okdc
from okdc.cohort import Branch, Cohort
from okdc.errors import CutError, DataError, NetworkError
from tests.helpers import networks, traps

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
EARLY = torch.ones(1, 8, 4, 4)  # what Tiny's second part takes


def trained(network: nn.Module, branch: Branch, images: torch.Tensor = IMAGES) -> Cohort:
    """A cohort after one step of plain SGD on all that requires a gradient."""
    cohort = Cohort(network, images, [branch], taps=("feature_maps",))
    optimizer = torch.optim.SGD([p for p in cohort.parameters() if p.requires_grad], 0.1)
    sum(z.square().mean() for z in cohort.train()(images).logits).backward()
    optimizer.step()
    return cohort


def test_parametrizations_are_kept() -> None:
    torch.manual_seed(0)
    network = networks.Tiny()
    parametrizations.weight_norm(network.late[0])
    parametrizations.orthogonal(network.head)
    keys = list(network.state_dict())
    cohort = trained(network, Branch("early", (1,)))
    branch = cohort.branches[0]
    assert not torch.equal(branch.head.weight, network.head.weight), "born with weights of its own"
    weight = branch.head.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(4), atol=1e-4, rtol=0)
    student = cohort.strip()
    assert student is network and list(student.state_dict()) == keys
    assert nn.utils.parametrize.is_parametrized(student.head, "weight")


def test_frozen_parameters_stay_frozen_in_every_member() -> None:
    torch.manual_seed(0)
    network = networks.Tiny()
    network.stem.requires_grad_(False)
    network.late[1].requires_grad_(False)
    before = {name: p.clone() for name, p in network.named_parameters()}
    cohort = trained(network, Branch("early", (1,)))
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {"stem.0.weight", "stem.1.weight", "stem.1.bias", "late.1.weight", "late.1.bias"}
    assert {name for name, p in network.named_parameters() if torch.equal(p, before[name])} == frozen
    assert not cohort.branches[0].late[1].weight.requires_grad


def test_buffers_that_the_forward_updates() -> None:
    network = traps.Counting()
    cohort = trained(network, Branch("early"))
    assert network.seen == 1, "once for the step, not for what was tried at construction"
    assert cohort.branches[0].seen == 1 and cohort.strip() is network


def test_channels_last() -> None:
    network = networks.Tiny()
    cohort = Cohort(network, IMAGES, [Branch("early", (1,))]).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    expected = copy.deepcopy(cohort).to(memory_format=torch.contiguous_format)(IMAGES)
    out = cohort(IMAGES.contiguous(memory_format=torch.channels_last))
    for mine, theirs in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert cohort.strip().early[0].weight.is_contiguous(memory_format=torch.channels_last)


class FrozenNorms(networks.Tiny):
    """Trains with the statistics that its normalisation came with, as detectors do."""

    def train(self, mode: bool = True) -> FrozenNorms:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def _channels_last() -> nn.Module:
    return networks.Tiny().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _weight_norm() -> nn.Module:
    network = networks.Tiny()
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(network.late[0])
    return network


def _orthogonal() -> nn.Module:
    network = networks.Tiny()
    parametrizations.orthogonal(network.head)
    return network


def _hooked() -> nn.Module:
    network = networks.Tiny()
    network.early.register_forward_hook(lambda module, given, output: output * 2)
    return network


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (_channels_last, lambda new, old: not new.late[0].weight.is_contiguous()),
        (_weight_norm, lambda new, old: not torch.equal(new.late[0].weight_g, old["late.0.weight_g"])),
        (_orthogonal, lambda new, old: torch.allclose(new.head.weight @ new.head.weight.T, torch.eye(4), atol=1e-4)),
        (FrozenNorms, lambda new, old: torch.equal(new.late[1].running_var, old["late.1.running_var"])),
        (_hooked, lambda new, old: torch.equal(new.early(EARLY), 2 * nn.Sequential(*new.early)(EARLY))),
    ],
    ids=["channels_last", "weight_norm", "parametrization", "frozen statistics", "hook"],
)
def test_the_students_of_whole_runs(make: Callable[[], nn.Module], kept: Callable[..., bool], tmp_path: Path) -> None:
    """From the user's network to the student: the same object, trained, with what it had."""
    torch.manual_seed(0)
    network = make()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    layouts = {name: tensor.stride() for name, tensor in network.state_dict().items()}
    batches = [(IMAGES, torch.arange(4))] * 2
    settings = {"epochs": 1, "weight_decay": 0, "onnx": False}  # torch's orthogonal does not survive weight decay
    student = okdc.compress(network, batches, batches, method="one", output=tmp_path, **settings).student
    after = student.state_dict()
    assert student is network and {name: tensor.stride() for name, tensor in after.items()} == layouts
    assert not torch.equal(after["stem.0.weight"], before["stem.0.weight"])
    assert kept(student, before)


def test_gradient_checkpointing_stays_on_the_target() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=4)
        network.set_grad_checkpointing(checkpointing)
        cohort = Cohort(network, images, [Branch("layer3.0")])
        sum(z.square().sum() for z in cohort.eval()(images).logits).backward()
        grads.append([p.grad for p in cohort.parameters()])
        assert network.grad_checkpointing is checkpointing and not cohort.branches[0].grad_checkpointing
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_gradient_checkpointing_that_the_user_wrote() -> None:
    class Checkpointed(networks.Tiny):
        checkpointing, reentrant = False, False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.early(self.stem(x))
            run = (
                (lambda f, y: checkpoint(f, y, use_reentrant=self.reentrant))
                if self.checkpointing
                else lambda f, y: f(y)
            )
            return self.head(run(self.late, x).mean((2, 3)))

    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = Checkpointed()
        network.checkpointing = checkpointing
        cohort = Cohort(network, IMAGES, [Branch("early")])
        sum(z.square().sum() for z in cohort.eval()(IMAGES).logits).backward()
        grads.append([p.grad for p in cohort.parameters()])
        assert cohort.strip() is network and network.checkpointing is checkpointing
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.filterwarnings(
    "ignore:None of the inputs"
)  # torch's, of a reentrant checkpoint in a run without gradients
def test_a_checkpoint_that_cannot_be_shared_is_refused_before_training() -> None:
    class Whole(networks.Tiny):
        reentrant = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = checkpoint(lambda y: self.late(self.early(y)), self.stem(x), use_reentrant=self.reentrant)
            return self.head(x.mean((2, 3)))

    with pytest.raises(CutError, match=r"up to 'early'.*torch.utils.checkpoint.*--cut NAME"):
        Cohort(Whole(), IMAGES, [Branch("early")])
    Cohort(Whole(), IMAGES, [Branch("stem")])
    Whole.reentrant = True
    with pytest.raises(CutError, match=r"use_reentrant=True"):
        Cohort(Whole(), IMAGES, [Branch("stem")])


@pytest.mark.parametrize("name", ["repghostnet_050", "repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_reparameterisable_networks(name: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    network = timm.create_model(name, num_classes=4)
    keys = list(network.state_dict())
    student = trained(network, Branch("blocks.6" if "ghost" in name else "stages.2"), images).strip().eval()
    assert student is network and list(student.state_dict()) == keys
    with torch.no_grad():
        expected = student(images)
        torch.testing.assert_close(reparameterize_model(student)(images), expected, rtol=1e-3, atol=1e-4)


def _distilled() -> nn.Module:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 3}
    return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=4, **small)


def test_both_heads_of_a_distilled_network_are_trained_and_kept() -> None:
    network = _distilled()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    cohort = trained(network, Branch("blocks.1", (1,)))
    mine, theirs = (dict(each.named_parameters()) for each in (network, cohort.branches[0]))
    for head in ("head.weight", "head_dist.weight"):
        assert not torch.equal(mine[head], before[head]) and theirs[head].grad is not None
        assert not torch.equal(theirs[head], mine[head]), "each member has heads of its own"
    student = cohort.strip()
    assert student is network and list(student.state_dict()) == list(before)
    logits, token = student.eval().forward_features(IMAGES)[:, :2].unbind(1)
    torch.testing.assert_close(student(IMAGES), (student.head(logits) + student.head_dist(token)) / 2)


def test_distilled_training_with_its_two_outputs_is_refused() -> None:
    network = _distilled()
    network.set_distilled_training(True)
    with pytest.raises(
        NetworkError, match=r"returns a tuple of 2 .* in training mode; .*Turn its auxiliary outputs off"
    ):
        Cohort(network.train(), IMAGES, [Branch("blocks.1")])


def test_synchronised_batch_norm() -> None:
    """Its statistics need a process group only while training; the student has it as before."""
    network = nn.SyncBatchNorm.convert_sync_batchnorm(networks.Tiny())
    plain = networks.Tiny()
    plain.load_state_dict(network.state_dict())
    cohort = Cohort(plain, IMAGES, [Branch("early")])
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(cohort).eval()
    with torch.no_grad():
        torch.testing.assert_close(converted(IMAGES).logits[0], network.eval()(IMAGES))
    assert converted.strip() is plain


def test_synchronised_batch_norm_that_the_network_brings() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(networks.Tiny())
    keys = list(network.state_dict())
    cohort = Cohort(network, IMAGES, [Branch("early", (1,))])
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in cohort.branches.modules()) >= 1
    student = cohort.strip()
    assert student is network and list(student.state_dict()) == keys
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in student.modules()) == 3


def test_old_weight_norm_is_kept() -> None:
    torch.manual_seed(0)
    network = networks.Tiny()
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(network.late[0])
    keys = list(network.state_dict())
    student = trained(network, Branch("early", (1,))).strip()
    assert student is network and list(student.state_dict()) == keys and "late.0.weight_g" in keys


def test_what_is_shared_wrongly_is_named() -> None:
    class CountsCalls(networks.Tiny):
        """A module of the tail that does something else each time."""

        def __init__(self) -> None:
            super().__init__()
            self.drift = Drift()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.drift(self.late(self.early(self.stem(x)))).mean((2, 3)))

    class Drift(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Drift.calls += 1
            return x * Drift.calls

    with pytest.raises(CutError, match=r"'drift' is the first that differs.*--cut NAME.*--share none"):
        Cohort(CountsCalls(), IMAGES, [Branch("early")])


def test_other_outputs_than_logits_are_refused() -> None:
    class Dictionary(networks.Tiny):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"logits": super().forward(x)}

    with pytest.raises(
        NetworkError, match=r"returned a dict of 1 \('logits': .*super\(\).forward\(images\)\['logits'\]"
    ):
        Cohort(Dictionary(), IMAGES)
    with pytest.raises(NetworkError, match=r"no final Linear .* network.reset_classifier\(N\)"):
        Cohort(timm.create_model("test_resnet", num_classes=0), IMAGES, [Branch("layer1")])


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (networks.Tiny(), "name it instead of passing the object"),
        ("tests.helpers.networks:Tiny", "Give the function an argument num_classes"),
    ],
    ids=["object", "function"],
)
def test_a_wrong_number_of_classes_comes_with_what_to_type(model: Any, advice: str, tmp_path: Path) -> None:
    batches = [(IMAGES, torch.tensor([0, 1, 2, 5]))]
    with pytest.raises(DataError, match=rf"has 6 classes\. .*{advice}"):
        okdc.compress(model, batches, batches, method="one", output=tmp_path)
