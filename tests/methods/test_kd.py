"""KD against the numbers of a published trainer (tests/golden/kd_dml_kd), in float64; its teacher stays as it is."""

from __future__ import annotations

import copy

import torch
from torch import nn

from okdc.cohort import Cohort, CohortOutput
from okdc.losses import kl
from okdc.methods import settings
from okdc.methods.kd import Kd
from tests.helpers.networks import Tiny
from tests.methods.golden import assert_same, load


def method(teacher: nn.Module | None = None) -> Kd:
    return Kd(Cohort(Tiny(), torch.randn(2, 3, 32, 32)), teacher or Tiny(width=4))


def test_losses_and_gradients() -> None:
    t, meta = load("kd_dml_kd")
    hyper, expected = meta["hyper"], meta["expected"]
    kd = method()
    assert (kd.temperature, kd.ce_weight, kd.kd_weight) == (hyper["T"], hyper["w_ce"], hyper["w_kd"])
    student, teacher = t["z_s"].requires_grad_(), t["z_t"].requires_grad_()
    parts = kd.losses(CohortOutput((student,), teacher=teacher), t["y"])
    assert_same(parts["ce/target"], hyper["w_ce"] * expected["ce"])
    assert_same(parts["kd/target"], hyper["w_kd"] * expected["kd_term"])
    assert_same(sum(parts.values()), expected["loss"])
    sum(parts.values()).backward()
    assert_same(student.grad, t["grad_z_s"], 2e-6)
    assert teacher.grad is None
    student.grad = None
    with_eps = kl(student, teacher, hyper["T"], eps=1e-7)
    assert_same(with_eps, meta["alt"]["kd_term_teacher_prob_plus_1e-7"])
    with_eps.backward()
    assert_same(student.grad, t["alt_grad_z_s_eps"], 2e-6)


def test_the_teacher_is_never_trained_nor_saved() -> None:
    teacher = Tiny(width=4).train()
    with torch.no_grad():
        teacher.stem[1].running_mean.fill_(0.3)  # so that training mode would give other logits
    before = copy.deepcopy(teacher.state_dict())
    kd = method(teacher).train()
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    optimizer = torch.optim.SGD(kd.param_groups(0.1), lr=0.1)
    parts = kd(images, labels)
    sum(parts.values()).backward()
    optimizer.step()
    assert kd.training and not any(m.training for m in teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    own = {id(p) for p in teacher.parameters()}
    assert not own & {id(p) for p in kd.parameters()} and len(kd.cohort.costs) == 1
    assert sum(v.numel() for v in kd.state_dict().values()) == 3 + sum(  # epoch, epochs, lr
        v.numel() for v in kd.cohort.target.state_dict().values()
    )
    taught, out = teacher(images), kd.cohort.eval()(images)
    expected = kd.losses(CohortOutput(out.logits, teacher=taught), labels)
    torch.testing.assert_close(kd(images, labels), expected)
    assert list(settings("kd").parameters) == ["temperature", "ce_weight", "kd_weight"]


def test_the_teacher_moves_with_the_method() -> None:
    kd = method().double().to(memory_format=torch.channels_last)
    weight = kd._teacher[0].stem[0].weight
    assert weight.dtype == torch.float64 and weight.is_contiguous(memory_format=torch.channels_last)
    twin = copy.deepcopy(kd)
    assert twin._teacher[0] is not kd._teacher[0]


def test_the_step_compiles_to_one_graph() -> None:
    kd, batch = method(), (torch.randn(4, 3, 32, 32), torch.arange(4))
    compiled = torch.compile(kd, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch), kd(*batch))
    torch._dynamo.reset()
