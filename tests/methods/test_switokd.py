"""SwitOKD beside its formulas in plain numbers: steps of momentum, pauses in which nothing of the teacher moves."""

from __future__ import annotations

import copy
import doctest
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import okdc
from okdc.errors import MethodError, RecipeError
from okdc.methods import switokd
from okdc.methods.switokd import Switokd
from tests.helpers.networks import Tiny, Tokens
from tests.helpers.training import SETTINGS, Crash, assert_same_run, crash_at, run, tiny_data
from tests.helpers.training import network as small

COLD = {"temperature": 0.05}  # probabilities are nearly 0 or 1, so that pauses come within a few steps


def method(**settings: object) -> Switokd:
    torch.manual_seed(0)
    return okdc.build(Tiny(), torch.randn(2, 3, 32, 32), Switokd, **settings)  # type: ignore[return-value]


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    top = max(row)
    powers = [math.exp((z - top) / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def has_paused(student: list, teacher: list, labels: list[int], temperature: float) -> bool:
    """Whether the teacher sits out: 1-norms image by image, their means, and the threshold of both."""
    gap = ours = theirs = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        p, q = softmax(s, temperature), softmax(t, temperature)
        y = [float(k == label) for k in range(len(p))]
        gap += sum(abs(a - b) for a, b in zip(p, q, strict=True)) / len(labels)
        ours += sum(abs(a - b) for a, b in zip(p, y, strict=True)) / len(labels)
        theirs += sum(abs(a - b) for a, b in zip(q, y, strict=True)) / len(labels)
    return theirs < ours and gap > ours - math.exp(-theirs / (ours + theirs)) * theirs


def loss(logits: Tensor, other: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """CE(z, y) + weight T^2 KL(other || z), the other a constant."""
    own = -(logits - logits.logsumexp(1, keepdim=True))[range(len(labels)), labels].mean()
    p = torch.tensor([softmax(row, temperature) for row in other.tolist()], dtype=torch.float64)
    scaled = logits / temperature
    log_q = scaled - scaled.logsumexp(1, keepdim=True)
    log_p = other.detach() / temperature
    log_p = log_p - log_p.logsumexp(1, keepdim=True)
    return own + weight * temperature**2 * (p * (log_p - log_q)).sum(1).mean()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    draw, labels = torch.Generator().manual_seed(1), torch.arange(8) % 4
    return [
        (torch.randn(8, 3, 32, 32, generator=draw).double() + labels.view(-1, 1, 1, 1) / 4, labels)
        for _ in range(count)
    ]


def momentum_step(network: nn.Module, loss: Tensor, velocities: list[Tensor]) -> None:
    """v = 0.9 v + g + 0.01 w, w -= 0.1 v."""
    weights = list(network.parameters())
    for w, g, v in zip(weights, torch.autograd.grad(loss, weights), velocities, strict=True):
        v.copy_(0.9 * v + g + 0.01 * w.detach())
        w.data -= 0.1 * v


def test_steps_of_both_kinds_are_those_of_the_formulas() -> None:
    ours = method(alpha=0.7, beta=0.4, **COLD).double()
    student, teacher = (copy.deepcopy(member).train() for member in ours.cohort.members)
    optimizer = torch.optim.SGD(ours.param_groups(0.1), lr=0.1, momentum=0.9, weight_decay=0.01)
    velocities = [[torch.zeros_like(w) for w in network.parameters()] for network in (student, teacher)]
    paused = []
    ours.train()
    for step, (images, labels) in enumerate(batches(6)):
        before = copy.deepcopy(teacher.state_dict())
        s, t = student(images), teacher(images)
        paused.append(has_paused(s.tolist(), t.tolist(), labels.tolist(), 0.05))
        losses = loss(s, t, labels, 0.7, 0.05), loss(t, s, labels, 0.4, 0.05)
        parts = ours(images, labels)
        assert sum(v.item() for v in parts.values()) == pytest.approx(sum(v.item() for v in losses), rel=1e-9), step
        momentum_step(student, losses[0], velocities[0])
        if paused[-1]:
            teacher.load_state_dict(before)  # of the batch norm; its momentum rests, too
        else:
            momentum_step(teacher, losses[1], velocities[1])
        optimizer.zero_grad()
        sum(parts.values()).backward()
        ours.before_step()
        optimizer.step()
        ours.after_step([(images, labels)])
        for member, twin in zip(ours.cohort.members, (student, teacher), strict=True):
            for (name, value), expected in zip(member.state_dict().items(), twin.state_dict().values(), strict=True):
                torch.testing.assert_close(value, expected, msg=f"{name} in step {step}")
    # There is a pause after the teacher has momentum, and a step in which it learns after that.
    assert any(a is False and True in paused[i:] and False in paused[i:][paused[i:].index(True) :]
               for i, a in enumerate(paused)), paused  # fmt: skip


def test_classes_and_probabilities_are_as_far() -> None:
    ours = method()
    student, teacher = torch.randn(2, 5, 4).unbind()
    classes = torch.tensor([0, 3, 2, 1, 1])
    as_classes = ours.distances(student, teacher, classes)
    torch.testing.assert_close(as_classes, ours.distances(student, teacher, nn.functional.one_hot(classes, 4).float()))
    assert doctest.testmod(switokd).attempted == 1 and doctest.testmod(switokd).failed == 0


class Counted(Switokd):
    """Notes down in which steps the teacher sat out."""

    def __init__(self, cohort: okdc.Cohort) -> None:
        super().__init__(cohort, **COLD)
        self.pauses: list[bool] = []

    def before_step(self) -> None:
        super().before_step()
        self.pauses.append(all(p.grad is None for p in self.cohort.members[1].parameters()))


def counted(norm: bool = True) -> Counted:
    torch.manual_seed(0)
    return okdc.build(small(norm=norm, drop=0), torch.randn(2, 3, 8, 8), Counted)  # type: ignore[return-value]


def test_a_run_goes_on_to_the_bit_across_pauses(tmp_path: Path) -> None:
    settings = replace(SETTINGS, recovery_interval=1)
    straight = run(tmp_path / "straight", settings, method=counted())
    with pytest.raises(Crash):
        run(tmp_path / "again", settings, method=counted(), data=tiny_data(crash_at(1, 3)))
    resumed = run(tmp_path / "again", settings, method=counted(), resume=tmp_path / "again" / "last.pth.tar")
    assert_same_run(straight, resumed, tmp_path / "straight", tmp_path / "again")
    pauses = straight.method.pauses
    shares = [row["log/paused/peer1"] for row in resumed.history]
    assert shares == [sum(pauses[6 * epoch : 6 * epoch + 6]) / 6 for epoch in range(3)]
    assert {True, False} == set(pauses[9:]) and pauses[9:] == resumed.method.pauses


def test_accumulated_batches_decide_as_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", method=counted(norm=False)).method
    settings = replace(SETTINGS, batch_size=4, grad_accum_steps=2)
    parts = run(tmp_path / "parts", settings, method=counted(norm=False), data=tiny_data(batch=4)).method
    assert whole.pauses == parts.pauses and set(parts.pauses) == {True, False}
    for (name, value), expected in zip(parts.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_steps_compile_and_pause_as_they_do_without(tmp_path: Path) -> None:
    plain, compiled = counted(), counted()
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for each, run_it in ((plain, plain), (compiled, forward)):
        optimizer = torch.optim.SGD(each.param_groups(0.05), lr=0.05, momentum=0.9)
        for images, labels in batches(5):
            optimizer.zero_grad()
            sum(run_it.train()(images[..., :8, :8].float(), labels % 3).values()).backward()
            each.before_step()
            optimizer.step()
            each.after_step([])
    assert plain.pauses == compiled.pauses and set(plain.pauses) == {True, False}


def test_a_loop_that_leaves_out_the_decision_is_told() -> None:
    ours = method()
    sum(ours.train()(torch.randn(4, 3, 32, 32), torch.arange(4)).values()).backward()
    with pytest.raises(MethodError, match=r"before_step\(\): call it before optimizer.step"):
        ours.after_step([])


@pytest.mark.parametrize("wishes", [{"members": 3}, {"share": "trunk"}, {"peers": [Tiny(), Tokens()]}])
def test_other_cohorts_are_refused(wishes: dict) -> None:
    with pytest.raises(RecipeError, match="one teacher, which shares nothing"):
        method(**wishes)
