"""One step of a method on noise, before training and undone: who learns, from what, and what would be forgotten."""

from __future__ import annotations

import inspect
import logging
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.anatomy.modes import unchanged
from okdc.errors import MethodError, OkdcError, first_line
from okdc.methods.shared.checks import refuse_losses
from okdc.methods.shared.memory import can_be_put_back, forgotten, kept, put_back, refuse_hidden
from okdc.needs import NOTHING, Needs
from okdc.system.randomness import random_state, set_random_state

if TYPE_CHECKING:
    from okdc.methods.shared.base import Method

IMAGES = 4  # two of each of two classes, so that methods that compare images find pairs
BASE = "okdc.methods.shared.base"
ABSURD = 1e4  # of a loss on noise; the cross-entropy of a million classes is 14
HOOKS = {
    "before_step": "It is called when a step has its gradients, with nothing.",
    "after_step": "It is called after each step of the optimizer, with the batches of it, which can be read once.",
}

log = logging.getLogger("okdc")


def batch_of(method: Method, needs: Needs = NOTHING, size: int = IMAGES) -> tuple[Tensor, ...]:
    """Noise and labels as the method asks for them."""
    anatomy, first = method.cohort.anatomy, next(method.parameters())
    views = len(needs.strengths(len(method.cohort)))
    shape = (*((views,) if views > 1 else ()), size, *anatomy.input_size)
    images = torch.randn(shape, device=first.device, dtype=first.dtype)
    indices = torch.arange(size, device=first.device)
    labels = method.task.made_up(indices // 2, anatomy.num_classes)
    return (images, labels, indices) if needs.indices else (images, labels)


def try_step(method: Method, needs: Needs = NOTHING, soft_labels: bool = False) -> None:
    """MethodError for what cannot be meant, a warning of `okdc` for what could; the method is left as it was.

    `soft_labels`: labels will be class probabilities (B, C), so they are tried too.
    """
    for problem in problems(method, needs, soft_labels):
        log.warning("%s", problem)


def problems(method: Method, needs: Needs = NOTHING, soft_labels: bool = False) -> list[str]:
    """What `try_step` warns of."""
    kind = type(method)
    refuse_hidden(method)
    _refuse_groups(method)
    with undone(method):
        batch = batch_of(method, needs)
        before = kept(method)
        soft = _softened(method, batch) if soft_labels and batch[1].dim() == 1 else None
        parts = refuse_losses(kind, _soft_losses(method, batch, soft) if soft else _losses(method, batch))
        found = _sizes(kind, parts, method.cohort.anatomy.num_classes) + _idle(method, parts)
        if any(getattr(kind, name).__module__ != BASE for name in HOOKS) and can_be_put_back(method):
            _try_hooks(method, soft or batch)
        _refuse_graphs(method)
        found += forgotten(method, before, kept(method))
        return found + (_other_losses(method, batch, soft) if soft else [])


@contextmanager
def undone(method: Method) -> Iterator[None]:
    """All is afterwards what it was: buffers, modes, random numbers, gradients, and what is remembered beside them."""
    before, own = kept(method), [(p, p.grad) for p in method.parameters()]
    try:
        with unchanged(method):
            yield
    finally:
        for parameter, gradient in own:
            parameter.grad = gradient
        put_back(method, before)
        method.logged()  # and forgotten


def _try_hooks(method: Method, batch: tuple[Tensor, ...]) -> None:
    """MethodError where what is called around an optimizer step fails; parameters are afterwards what they were."""
    parameters = list(method.parameters())
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        _try_hook(method, "before_step")
        for parameter in parameters:
            parameter.grad = None  # as the loop does after a step
        _try_hook(method, "after_step", iter([batch]))
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)


def _try_hook(method: Method, name: str, *given: Any) -> None:
    """Call it; MethodError, with the line of the author's file, in place of what it raises."""
    try:
        getattr(method, name)(*given)
    except OkdcError:
        raise
    except Exception as error:
        raise _in_words(type(method), name, error, HOOKS[name]) from error


def _in_words(kind: type[Method], name: str, error: Exception, advice: str) -> MethodError:
    """What an author's `name` raised, with the line of his file."""
    file = inspect.unwrap(getattr(kind, name)).__code__.co_filename
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f", in line {frames[-1].lineno} of {PurePath(frames[-1].filename).name}" if frames else ""
    told = first_line(error).rstrip(".")
    return MethodError(
        f"{name} of {kind.__name__} fails in a first step{where}: {type(error).__name__}: {told}. {advice}"
    )


def _losses(method: Method, batch: tuple[Tensor, ...]) -> Any:
    """The losses; MethodError, with the line of the author's file, in place of what they raise."""
    kind = type(method)
    try:
        return method.train()(*batch)
    except (OkdcError, NotImplementedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if kind.__module__.startswith("okdc."):
            raise
        name = "losses" if kind.forward.__module__ == BASE else "forward"
        shapes = zip(("images", "labels", "indices"), batch)
        given = ", ".join(f"{each} {tuple(tensor.shape)}" for each, tensor in shapes)
        advice = f"By what needs() returns, forward is called with {given}."
        asked = ("self", "images", "labels", "indices")[: len(batch) + 1]
        if name == "forward" and len(inspect.signature(kind.forward).parameters) != len(asked):
            advice += f" So write forward({', '.join(asked)})."
        raise _in_words(kind, name, error, advice) from error


def _refuse_graphs(method: Method) -> None:
    """MethodError for a buffer that was filled with what still has a gradient: the next step would go back into it."""
    for name, buffer in method.named_buffers():
        if buffer.requires_grad:
            raise MethodError(
                f"the buffer {name!r} of {type(method).__name__} holds a graph after a step, which the next step would "
                "go back into: .detach() what fills it."
            )


def _refuse_groups(method: Method) -> None:
    """MethodError where the optimizer would be given nothing of the target."""
    if method.student is not method.cohort.target:  # an average, for example
        return
    groups = method.param_groups(0.1)
    if not isinstance(groups, list):
        raise MethodError(
            f"param_groups of {type(method).__name__} gave {type(groups).__name__}; expected a list of dictionaries "
            "with params and lr, as torch's optimizers take."
        )
    given = {id(p) for group in groups for p in _listed(group)}
    learning = [p for p in method.cohort.target.parameters() if p.requires_grad]
    if learning and not any(id(p) in given for p in learning):
        raise MethodError(
            f"param_groups of {type(method).__name__} has no parameter of the target, which ships: it would stay as it "
            "is. Begin from self.parameters(), which has all."
        )


def _listed(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group; a generator in it is not used up."""
    group["params"] = list(group["params"]) if not isinstance(group["params"], Tensor) else [group["params"]]
    return group["params"]


def _sizes(kind: type[Method], parts: dict[str, Tensor], classes: int) -> list[str]:
    """Losses of an absurd size, and those that have no gradient."""
    found = []
    for name, value in parts.items():
        size = value.item()
        if not math.isfinite(size) or abs(size) > ABSURD:
            found.append(
                f"{kind.__name__}: the loss {name!r} is {size:,.0f} for {IMAGES} images of noise before the first "
                f"step, and a cross-entropy of {classes} classes is about {math.log(max(2, classes)):.1f}. Take means, "
                "not sums, over images and pixels."
            )
        if not value.requires_grad:
            found.append(
                f"{kind.__name__}: the loss {name!r} has no gradient, so nothing learns from it. Leave out .detach() "
                f"and torch.no_grad() if something should; else write it down by self.log({name!r}, ...)."
            )
    return found


def _idle(method: Method, parts: dict[str, Tensor]) -> list[str]:
    """Members and modules of the method that no loss reaches; MethodError where that is the student."""
    groups = _groups(method)
    total = torch.stack([value.float() for value in parts.values() if value.requires_grad]).sum()
    reached = _reached(total, [p for parameters in groups.values() for p in parameters])
    idle = [name for name, parameters in groups.items() if parameters and not any(id(p) in reached for p in parameters)]
    kind = type(method).__name__
    if "target" in idle and method.student is method.cohort.target:
        raise MethodError(
            f"no loss of {kind} ({', '.join(parts)}) reaches the target, out.logits[0], which ships: it would not "
            "learn. Give it a loss, and leave out .detach() on the way to it."
        )
    return [
        f"{kind}: no loss reaches {name}, so nothing trains it. Give it one, or freeze it: .requires_grad_(False)."
        for name in idle
    ]


def _reached(total: Tensor, learning: list[nn.Parameter]) -> set[int]:
    """The ids of the parameters that a loss reaches, which have their gradients now."""
    return {id(p) for p, found in zip(learning, gradients(total, learning), strict=True) if found is not None}


def gradients(total: Tensor, learning: list[nn.Parameter]) -> list[Tensor | None]:
    """What a loss gives to each parameter, which keeps it."""
    for parameter in learning:
        parameter.grad = None
    total.backward()  # not autograd.grad, which gradient checkpointing may refuse
    return [p.grad for p in learning]


def _groups(method: Method) -> dict[str, list[nn.Parameter]]:
    """The learning parameters of each member, those that are its own, and of each further module of the method."""
    cohort, taken = method.cohort, set[int]()
    parts: list[tuple[str, nn.Module]] = list(zip(cohort.names, cohort.members, strict=True))
    parts += [(f"self.{name}", child) for name, child in method.named_children() if child is not cohort]
    groups: dict[str, list[nn.Parameter]] = {}
    for name, part in parts:
        groups[name] = [p for p in part.parameters() if p.requires_grad and id(p) not in taken]
        taken |= {id(p) for p in groups[name]}
    return groups


_ADVICE = (
    "With --mixup, --cutmix or --smoothing labels are probabilities (batch, classes): okdc.losses.cross_entropy takes "
    "both, and labels.argmax(1) are classes. Or leave these flags out."
)


def _softened(method: Method, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    images, labels, *indices = batch
    return (images, F.one_hot(labels, method.cohort.anatomy.num_classes).to(images.dtype), *indices)


def _soft_losses(method: Method, batch: tuple[Tensor, ...], soft: tuple[Tensor, ...]) -> Any:
    """What the losses are of class probabilities; MethodError where they only take classes."""
    try:
        return method.train()(*soft)
    except OkdcError:
        raise
    except Exception as error:
        _losses(method, batch)  # which raises an error of its own where the labels are not to blame
        told = first_line(error).rstrip(".")
        raise MethodError(
            f"the losses of {type(method).__name__} cannot use labels that are probabilities: {told}. {_ADVICE}"
        ) from error


def _other_losses(method: Method, batch: tuple[Tensor, ...], soft: tuple[Tensor, ...]) -> list[str]:
    """Whether a class and the probability 1 of it give the same losses, in words where they do not."""
    method.eval()
    state = random_state()
    with torch.no_grad():
        as_soft = method(*soft)
        set_random_state(state)
        try:
            hard = method(*batch)
        except Exception:  # it is made for probabilities alone
            return []
    for name in hard.keys() & as_soft.keys():
        if not torch.allclose(hard[name], as_soft[name], rtol=1e-3, atol=1e-4):
            return [
                f"{type(method).__name__}: the loss {name!r} is {hard[name].item():.4g} of classes, and "
                f"{as_soft[name].item():.4g} of the same as probabilities. {_ADVICE}"
            ]
    return []
