"""What came frozen and in evaluation mode leaves training as it came, in the target and in copies of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import okdc
from okdc.anatomy.modes import resting
from okdc.cohort import Branch, Cohort
from tests.helpers.networks import Tiny, conv


class Deeper(Tiny):
    """A stage more, so that branches may part after a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Sequential(conv(16, 32, 2), conv(32, 32))


def frozen() -> Deeper:
    """A network whose first two stages are frozen, in the mode that goes with it, with statistics of their own."""
    network = Deeper()
    for stage in (network.stem, network.early):
        stage.requires_grad_(False).eval()
        stage[1].running_mean.fill_(0.25)
    return network


def statistics(network: nn.Module, place: str = "") -> dict[str, Tensor]:
    return {k: v.clone() for k, v in network.state_dict().items() if "running" in k and k.startswith(place)}


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 4
    images = torch.randn(16, 3, 16, 16, generator=draw) + labels.view(-1, 1, 1, 1)
    return [(images[:8], labels[:8]), (images[8:], labels[8:])]


@pytest.mark.parametrize("method", ["baseline", "dml", "ahbf", "one", "pcl"])
def test_statistics_of_a_frozen_backbone_stay(method: str, tmp_path: Path) -> None:
    network = frozen()
    before = network.state_dict() | {k: v.clone() for k, v in network.state_dict().items()}
    settings = {"batch_size": 8, "epochs": 2, "lr": 0.1, "onnx": False, "output": tmp_path, "device": "cpu"}
    okdc.compress(network, batches(), batches(), method=method, **settings)
    after = network.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert not {key for key in moved if key.startswith(("stem.", "early."))}
    assert {"late.0.1.running_mean", "late.1.1.running_var", "head.weight"} <= moved


def test_copies_have_the_frozen_part_too_and_it_is_at_rest_there() -> None:
    torch.manual_seed(0)
    network = frozen()
    cohort = Cohort(network, torch.randn(2, 3, 16, 16), [Branch(), Branch("early", (1,))]).train()
    peer = cohort.branches[0]
    for member in (network, peer):
        assert not any(m.training for stage in (member.stem, member.early) for m in stage.modules())
        assert all(m.training for m in member.late.modules())
    assert torch.equal(peer.early[0].weight, network.early[0].weight)  # random and frozen, it would know nothing
    assert not torch.equal(peer.late[0][0].weight, network.late[0][0].weight)
    for _ in range(2):
        cohort(torch.randn(4, 3, 16, 16))
    assert all((mean == 0.25).all() for key, mean in statistics(peer, "early").items() if key.endswith("mean"))
    cohort.eval().train()
    assert not peer.early[1].training


def test_blocks_that_a_branch_is_given_learn_also_where_the_stage_they_repeat_is_frozen() -> None:
    network = Deeper()
    network.late.requires_grad_(False).eval()
    cohort = Cohort(network, torch.randn(2, 3, 16, 16), [Branch("early", (1,))]).train()
    own = [p for p in cohort.branches[0].late.parameters() if p.requires_grad]
    assert own and any(m.training for m in cohort.branches[0].late.modules() if isinstance(m, nn.BatchNorm2d))


def test_what_is_at_rest() -> None:
    """Evaluation mode counts where nothing in it learns; that of a whole network is no wish."""
    assert resting(Tiny()) == [] and resting(Tiny().eval()) == []
    network = Tiny()
    network.early.eval()
    assert resting(network) == []  # it learns, and PyTorch's own loops would say network.train()
    whole = frozen().eval()
    assert {whole.stem, whole.early} <= set(resting(whole)) and whole.late not in resting(whole)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Dropout())
    plain[1].eval()
    assert resting(plain) == [plain[1]] and resting(plain.eval()) == []
