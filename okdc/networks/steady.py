"""Whether what a network says can ship: the same each time, of an image alone as beside others, and logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from okdc import tasks
from okdc.anatomy.calls import refuse_wrapped
from okdc.anatomy.modes import unchanged
from okdc.errors import NetworkError, first_line
from okdc.networks.input import name_of
from okdc.tasks.task import Task

_IMAGES = 4
_SAME = 1e-4  # of the largest logit: on a GPU even two passes add up in another order
_ALONE = 1e-3  # likewise; for one image other kernels compute
_ASLEEP = 1e-3  # parameters that are no larger begin as nothing


def refuse_unsteady(network: nn.Module, input_size: tuple[int, int, int], task: Task | None = None) -> None:
    """Raise NetworkError where nothing that is made of the network could be verified, before it is trained in vain.

    In evaluation mode, on noise of `input_size` (C, H, W): it gives other logits the second time, or other logits for
    one image alone than beside others; or it gives probabilities, where logits are
    expected.
    """
    task = task or tasks.get()
    refuse_wrapped(network)
    images = _noise(network, input_size)
    with unchanged(network), torch.no_grad(), _awake(network):
        network.eval()
        once = _logits(network, images, task)
        if (apart := _difference(once, _logits(network, images, task))) > _SAME:
            raise NetworkError(
                f"{name_of(network)} gives other logits for the same images each time (by {apart:.0%} of the largest) "
                f"in evaluation mode, so that nothing made of it could be verified.{_begins(network, images, images)} "
                "Dropout and noise are for training alone: F.dropout(x, p, self.training), if self.training: ..."
            )
        if (apart := _difference(once[:1], _logits(network, images[:1], task))) > _ALONE:
            raise NetworkError(
                f"{name_of(network)} gives other logits for an image alone than beside others (by {apart:.0%} of the "
                "largest) in evaluation mode, so that its answer would depend on which images come together."
                f"{_begins(network, images, images[:1])} Statistics of the batch, means and norms over it are for "
                "training alone: BatchNorm2d keeps running ones (track_running_stats=True)."
            )
        follows = "all that follows takes logits (the loss in training, predict.py)"
        _refuse_probabilities(network, images, once, task, name_of(network), follows)


def refuse_probabilities(network: nn.Module, name: str, input_size: tuple[int, int, int], task: Task) -> None:
    """Raise NetworkError where the trained network called `name`, of which logits are expected, gives probabilities.

    Noise of `input_size` (C, H, W) shows it, in evaluation mode.
    """
    images = _noise(network, input_size)
    with unchanged(network), torch.no_grad():
        logits = _logits(network.eval(), images, task)
        _refuse_probabilities(network, images, logits, task, name, "whoever learns from it takes logits")


def _refuse_probabilities(
    network: nn.Module, images: Tensor, given: Tensor, task: Task, name: str, follows: str
) -> None:
    if task.are_probabilities(given):
        last = task.activation
        raise NetworkError(
            f"{name} ends in a {last.lower()}: it gives probabilities, and {follows} and would take the "
            f"{last.lower()} a second time. Leave it out: {_last_activation(network, images, last)}."
        )


def _noise(network: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    weight = next(network.parameters(), torch.zeros(()))
    images = torch.randn(_IMAGES, *input_size, generator=torch.Generator().manual_seed(0))
    return images.to(weight.device, weight.dtype)


@contextmanager
def _awake(network: nn.Module) -> Iterator[None]:
    """Meanwhile parameters that begin as nothing, and hide all that comes before them, are noise."""
    floating = [p for p in network.parameters() if p.is_floating_point() and p.numel()]
    asleep = [(p, p.clone()) for p in floating if p.abs().max() <= _ASLEEP]
    try:
        for parameter, _ in asleep:
            parameter.normal_(std=0.1)
        yield
    finally:
        for parameter, value in asleep:
            parameter.copy_(value)


def _logits(network: nn.Module, images: Tensor, task: Task) -> Tensor:
    try:
        return task.result(network(images))
    except Exception as error:  # whatever a stranger's forward raises; of one image alone it gave logits
        raise NetworkError(
            f"{name_of(network)} takes one image, and cannot take {len(images)} at once: {first_line(error)}. Does its "
            "forward state the batch? x.flatten(1) in place of x.view(1, -1)."
        ) from error


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest logit; 0 where there are others than numbers, which say nothing."""
    if one.shape != other.shape or not (one.isfinite().all() and other.isfinite().all()):
        return 0.0
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))


def _last_activation(network: nn.Module, images: Tensor, kind: str) -> str:
    inner = [call for call in _calls(network, images) if call.name]
    if inner and type(network.get_submodule(inner[-1].name)).__name__ == kind:
        return f"torch.nn.Identity() in place of {inner[-1].name!r}"
    return "return what goes into it"


@dataclass(frozen=True)
class _Call:
    """What one call of a module took and gave."""

    name: str
    taken: list[Tensor]
    given: list[Tensor]


def _calls(network: nn.Module, images: Tensor) -> list[_Call]:
    """Every call of every module, in the order of ending."""
    calls: list[_Call] = []
    waiting: list[list[Tensor]] = []
    names = {module: name for name, module in network.named_modules()}

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        waiting.append(_tensors((args, kwargs)))

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        calls.append(_Call(names[module], waiting.pop(), _tensors(output)))

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in names]
    handles += [module.register_forward_hook(leave) for module in names]
    try:
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _tensors(values: object) -> list[Tensor]:
    return [value.clone() for value in tree_leaves(values) if isinstance(value, Tensor)]  # as they are now


def _begins(network: nn.Module, images: Tensor, others: Tensor) -> str:
    """The module where two passes part: the first that takes the same and gives something else, as a sentence."""
    pairs = list(zip(_calls(network, images), _calls(network, others), strict=False))
    for one, other in pairs:
        if one.name != other.name:
            return f" It begins where {one.name!r} is called one time and {other.name!r} another."
        if _alike(one.taken, other.taken) and not _alike(one.given, other.given):
            break
    else:
        return ""
    module = network.get_submodule(one.name)
    where = f"{one.name!r} ({type(module).__name__})" if one.name else f"{type(module).__name__}'s own forward"
    if not any(True for _ in module.children()):
        return f" It begins in {where}."
    after = next((a.name for a, b in pairs if not _alike(a.taken, b.taken)), None)
    return f" It begins in {where}, {f'before {after!r} is called' if after else 'after its last part'}."


def _alike(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Whether values are the same, those of a batch of one as those of the first image of a larger one."""
    for one, other in zip(ones, others, strict=False):
        if one.shape[1:] == other.shape[1:] and one.dim() and len(one) == _IMAGES * len(other):
            one = one[: len(other)]
        if one.shape == other.shape and not _close(one, other):
            return False
    return True


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return bool((one - other).abs().max() <= _SAME * one.abs().max()) if one.numel() else True
