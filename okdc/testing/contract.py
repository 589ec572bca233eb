"""What every method has to do, each demand a function of a `Case`; an AssertionError says what is not so."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from okdc.anatomy.modes import at_rest, unchanged
from okdc.methods import Method
from okdc.testing.case import Case

STEPS = 4


def learns(case: Case) -> None:
    """After three steps every parameter that learns has moved, and losses are finite."""
    method = case.build()
    method.begin_epoch(1, 2)
    learning = {name: p for name, p in method.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learning.items()}
    optimizer = case.optimizer(method)
    for _ in range(3):
        parts = case.step(method, optimizer)
        assert parts, "there are no losses"
        wild = [name for name, value in parts.items() if not torch.tensor(value).isfinite()]
        assert not wild, f"{_listed(wild)} is not finite"
    # A bias in front of a batch norm is cancelled by it: the gradient is rounding alone, and may be nothing.
    still = [name for name, p in learning.items() if torch.equal(p, before[name]) and not name.endswith(".bias")]
    assert not still, f"{_listed(still)} did not move in three steps: no loss reaches it, or param_groups leaves it out"
    frozen = [name for name, p in method.named_parameters() if name not in learning and p.grad is not None]
    assert not frozen, f"{_listed(frozen)} is frozen, and has a gradient"
    without = [name for name, p in learning.items() if p.grad is None]
    assert not without, f"{_listed(without)} has no gradient"


def birth(case: Case) -> None:
    """Members differ before the first step: alike they would stay alike. The ensemble has the logits' shape."""
    method = case.build().eval()
    out = method.cohort(case.images(method))
    said = method.said(out)
    for i, mine in enumerate(said):
        for j, other in enumerate(said[:i]):
            names = f"{method.learners[j]} and {method.learners[i]}"
            assert (mine - other).abs().max() > 1e-4, f"{names} say the same at birth, so they would stay the same"
    shape = tuple(method.ensemble(out).shape)
    expected = tuple(out.logits[0].shape)
    assert shape == expected, f"ensemble gives {shape}; expected {expected}, one tensor of logits"


def labels(case: Case) -> None:
    """A class, and the probability 1 of it, as mixup and label smoothing have labels, give the same losses."""
    method, other = case.build().eval(), case.build().eval()  # one alone may remember what it saw first
    images, classes, *indices = case.batch(method)
    if classes.dim() > 1:
        return
    torch.manual_seed(0)  # a method may draw
    hard = method(images, classes, *indices)
    torch.manual_seed(0)
    soft = other(images, F.one_hot(classes, method.cohort.anatomy.num_classes).to(images.dtype), *indices)
    for name, value in hard.items():
        same = torch.allclose(value, soft[name], rtol=1.3e-6, atol=1e-5)
        assert same, f"the loss {name!r} is {value.item():.6g} of classes, {soft[name].item():.6g} of probabilities"


def student(case: Case) -> None:
    """What strip gives is the user's own object, with its keys and no hooks, and computes what it did inside."""
    torch.manual_seed(0)
    target = case.target()
    keys, flags = list(target.state_dict()), [getattr(m, "inplace", None) for m in target.modules()]
    method = case.build(target)
    case.step(method, case.optimizer(method))
    images = case.images(method)
    inside = method.eval().cohort(images).logits[0]
    left = method.strip()
    assert left is target, f"strip gave a {type(left).__name__} that is not the object that came in"
    assert list(left.state_dict()) == keys, "the student's state_dict has other keys than the network that came in"
    assert [getattr(m, "inplace", None) for m in left.modules()] == flags, "an in-place flag is not what it was"
    hooked = [n for n, m in left.named_modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    assert not hooked, f"{_listed(hooked)} of the student still has hooks"
    alone = left(images[0] if images.dim() == 5 else images)
    assert torch.equal(alone, inside), "the student alone says something else than inside the cohort"


def resume(case: Case) -> None:
    """The same seed gives the same numbers, and a run that goes on from what was saved gives them too, to the bit."""
    straight, again = case.build(), case.build()
    first, second = case.optimizer(straight), case.optimizer(again)
    losses = [case.step(straight, first) for _ in range(STEPS)]
    once_more = [case.step(again, second) for _ in range(STEPS // 2)]
    assert once_more == losses[: STEPS // 2], "two runs of the same seed differ: draw with torch's global generators"
    saved = copy.deepcopy((again.state_dict(), second.state_dict()))
    resumed = case.build()
    for parameter in resumed.parameters():
        parameter.data.zero_()  # nothing but what was saved may matter
    third = case.optimizer(resumed)
    resumed.load_state_dict(saved[0])
    third.load_state_dict(saved[1])
    found = [case.step(resumed, third) for _ in range(STEPS - STEPS // 2)]
    advice = "what it remembers has to be a buffer, or in get_extra_state"
    assert found == losses[STEPS // 2 :], (
        f"a run that goes on has other losses ({_difference(losses, found)}): {advice}"
    )
    mine, theirs = resumed.state_dict(), straight.state_dict()
    apart = [n for n, value in theirs.items() if isinstance(value, torch.Tensor) and not torch.equal(mine[n], value)]
    assert not apart, f"{_listed(apart)} is another one where a run goes on: {advice}"


def precision(case: Case) -> None:
    """Losses are in float32 under autocast, where half precision would round them."""
    method = case.build().train()
    with torch.autocast("cpu", torch.bfloat16):
        parts = method(*case.batch(method))
    rounded = [f"{name} ({value.dtype})" for name, value in parts.items() if value.dtype != torch.float32]
    assert not rounded, f"{_listed(rounded)} is not in float32 under --amp: the functions of okdc.losses are"


def means(case: Case) -> None:
    """A batch given twice over has the losses of the batch: they are means over images, as the loop expects."""
    method, other = case.build().eval(), case.build().eval()
    images, classes, *indices = case.batch(method)
    twice = (torch.cat([images, images], -4), *(torch.cat([each, each]) for each in (classes, *indices)))
    with torch.no_grad():
        torch.manual_seed(0)
        once = method(images, classes, *indices)
        torch.manual_seed(0)
        double = other(*twice)
    sums = [name for name, value in once.items() if value > 0 and 1.95 < double[name] / value < 2.05]
    assert not sums, f"{_listed(sums)} is twice as large for twice the images: it is a sum, and has to be a mean"


DEMANDS: dict[str, Callable[[Case], None]] = {
    "everything learns": learns,
    "members differ at birth": birth,
    "labels may be probabilities": labels,
    "losses are means": means,
    "losses are in float32": precision,
    "a run goes on to the bit": resume,
    "the student is the network alone": student,
}


def cost(case: Case, method: Method) -> str:
    """What a step of it computes beside the network alone, counted as it runs, in words."""
    batch = case.batch(method)
    with unchanged(method), at_rest(method), torch.no_grad(), FlopCounterMode(display=False) as counter:
        method(*batch)
    times = counter.get_total_flops() / len(batch[1]) / method.cohort.costs[0].flops
    learning = sum(p.numel() for p in method.parameters() if p.requires_grad)
    alone = sum(p.numel() for p in _learning(method.cohort.target))
    more = learning / alone
    return f"{times:.2g} times the FLOPs of the network alone, forward, and {more:.2g} times its parameters learn."


def _learning(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _difference(losses: list[dict[str, float]], found: list[dict[str, float]]) -> str:
    """The first loss that is another one."""
    for expected, got in zip(losses[-len(found) :], found, strict=True):
        for name, value in expected.items():
            if got.get(name) != value:
                return f"{name} is {got.get(name, float('nan')):.6g}, not {value:.6g}"
    return "their names"
