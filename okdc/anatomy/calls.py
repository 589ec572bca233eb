"""Watching a network run once: every call of every module, its shapes, and the FLOPs spent until then."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from okdc.anatomy.modes import at_rest
from okdc.anatomy.shapes import positions
from okdc.errors import NetworkError, first_line


@dataclass(frozen=True)
class Call:
    """One call of one module; `start` and `end` count hook events, `flops_*` what the network had spent by then."""

    name: str
    kind: str
    leaf: bool
    start: int
    end: int
    flops_start: int
    flops_end: int
    input: tuple[int, ...] | None
    outputs: tuple[tuple[int, ...], ...]  # shapes without the batch of all tensors that came out
    packed: bool  # the one tensor comes with other values (its size, say) in a tuple or list
    repeats: bool  # several tensors came out, and the first are shaped as what came in (two streams, a map and a state)

    @property
    def output(self) -> tuple[int, ...] | None:
        """The output's shape without the batch; None when there is not one tensor."""
        return self.outputs[0] if len(self.outputs) == 1 else None

    @property
    def keeps_shape(self) -> bool:
        return self.input is not None and self.input == self.output

    @property
    def chains(self) -> bool:
        """Whether what it gives is shaped as what it takes, so that it can be called once more."""
        return self.keeps_shape or self.repeats

    def keeps_positions(self, aspect: float) -> bool:
        return positions(self.input, aspect) == positions(self.output, aspect)


def watch(network: nn.Module, images: Tensor) -> tuple[list[Call], object]:
    """All calls in the order in which they ended (the network's own last), and what the network returned."""
    refuse_wrapped(network)
    calls: list[Call] = []
    open_calls: list[tuple[int, int, tuple[int, ...] | None, tuple[tuple[int, ...], ...]]] = []
    clock = 0

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal clock
        clock += 1
        shapes = [tuple(a.shape[1:]) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        open_calls.append((clock, counter.get_total_flops(), shapes[0] if shapes else None, _shapes((args, kwargs))))

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        nonlocal clock
        clock += 1
        start, flops, shape, taken = open_calls.pop()
        given = _shapes(output)
        both = min(len(taken), len(given))
        repeats = len(given) > 1 and both > 0 and taken[:both] == given[:both]
        kind, leaf = type(module).__name__, next(module.children(), None) is None
        packed = not isinstance(output, Tensor)
        spent = counter.get_total_flops()
        calls.append(Call(names[module], kind, leaf, start, clock, flops, spent, shape, given, packed, repeats))

    names = {module: name for name, module in network.named_modules()}
    handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    counter = FlopCounterMode(display=False)
    try:
        with at_rest(network), torch.no_grad(), counter:
            logits = network(images)
    except _SHAPE_ERRORS as error:
        raise NetworkError(
            f"{type(network).__name__} cannot run on images {tuple(images.shape)}: {first_line(error)}. "
            "Give it the size it takes (--img-size, --in-chans)."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls, logits


def refuse_wrapped(network: nn.Module) -> None:
    """NetworkError for what is no plain module, whose parts would not be seen or not be copied."""
    scripted = [
        n or type(network).__name__ for n, m in network.named_modules() if isinstance(m, torch.jit.ScriptModule)
    ]
    if scripted:
        raise NetworkError(
            f"{scripted[0]} is a TorchScript program, whose parts cannot be watched or changed. Pass the nn.Module "
            "that it was scripted or traced from."
        )
    if "_orig_mod" in network._modules:
        raise NetworkError(
            "the network is wrapped by torch.compile, which hides its parts. Pass net._orig_mod; --torchcompile "
            "compiles the network together with its branches."
        )
    if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise NetworkError(
            f"the network is wrapped by {type(network).__name__}, which would run it on several devices by itself. "
            "Pass net.module; --devices trains it on several."
        )


def _shapes(values: object) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(each.shape[1:]) for each in tree_leaves(values) if isinstance(each, Tensor))


_SHAPE_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError)


def called_once(calls: list[Call]) -> set[str]:
    count = Counter(c.name for c in calls)
    return {name for name, times in count.items() if times == 1}
