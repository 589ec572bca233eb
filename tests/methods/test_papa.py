"""PAPA beside its algorithm written out in plain numbers, steps of momentum and pulls alike."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import okdc
from okdc.errors import RecipeError
from okdc.methods.papa import Papa, pull
from tests.helpers.networks import Tiny, Tokens


def method(**settings: object) -> Papa:
    torch.manual_seed(0)
    return okdc.build(Tiny(), torch.randn(2, 3, 32, 32), Papa, **settings)  # type: ignore[return-value]


def test_a_pull_in_numbers() -> None:
    networks = [[torch.tensor([1.0, 4.0])], [torch.tensor([3.0, 0.0])], [torch.tensor([8.0, 2.0])]]
    pull(networks, 0.25)  # means 4 and 2
    assert [tensors[0].tolist() for tensors in networks] == [[1.75, 3.5], [3.25, 0.5], [7.0, 2.0]]


def test_five_steps_are_those_of_the_algorithm() -> None:
    papa = method(members=3, decay=0.9, every=2, views=False).double()
    twins = [copy.deepcopy(member) for member in papa.cohort.members]  # hooks there are none: nothing is shared
    optimizer = torch.optim.SGD(papa.param_groups(0.1), lr=0.1, momentum=0.9, weight_decay=0.01)
    velocities = [[torch.zeros_like(p) for p in twin.parameters()] for twin in twins]
    draw = torch.Generator().manual_seed(1)
    papa.train()
    for step in range(1, 6):
        images, labels = torch.randn(6, 3, 32, 32, generator=draw).double(), torch.arange(6) % 4
        parts = papa(images, labels)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        papa.after_step([(images, labels)])
        for i, (twin, velocity, name) in enumerate(zip(twins, velocities, ("target", "peer1", "peer2"), strict=True)):
            loss = F.cross_entropy(twin.train()(images), labels)
            assert parts[f"ce/{name}"].item() == pytest.approx(loss.item(), rel=1e-9), (step, i)
            for p, g, v in zip(
                twin.parameters(), torch.autograd.grad(loss, list(twin.parameters())), velocity, strict=True
            ):
                v.copy_(0.9 * v + g + 0.01 * p.detach())
                p.data -= 0.1 * v
        if step % 2 == 0:
            for tensors in zip(*(twin.parameters() for twin in twins), strict=True):
                mean = (tensors[0] + tensors[1] + tensors[2]).detach() / 3
                for p in tensors:
                    p.data = 0.9 * p.data + 0.1 * mean
    for member, twin in zip(papa.cohort.members, twins, strict=True):
        for (name, value), expected in zip(member.state_dict().items(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected, msg=name)


def test_networks_come_nearer_and_the_count_of_steps_is_remembered() -> None:
    papa, other = method(every=3, decay=0.5), method(every=3)
    apart = [(a - b).norm().item() for a, b in zip(*(m.parameters() for m in papa.cohort.members[:2]), strict=True)]
    papa.after_step([]), papa.after_step([])
    other.load_state_dict(papa.state_dict())
    assert other.steps == 2
    papa.after_step([])
    now = [(a - b).norm().item() for a, b in zip(*(m.parameters() for m in papa.cohort.members[:2]), strict=True)]
    assert now == pytest.approx([0.5 * each for each in apart], rel=1e-4)


@pytest.mark.parametrize("settings", [{"peers": [Tokens()]}, {"share": "trunk"}])
def test_networks_whose_weights_have_no_mean_are_refused(settings: dict) -> None:
    with pytest.raises(RecipeError, match="several of one architecture"):
        method(**settings)
    with pytest.raises(RecipeError, match="papa has decay 2"):
        method(decay=2)
