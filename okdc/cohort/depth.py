"""Making a branch deeper by blocks of the network's own, or where it has none by okdc's; or shallower."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from okdc.anatomy import Anatomy, Call, Stage
from okdc.anatomy.modes import at_rest
from okdc.anatomy.shapes import layout, positions, same_size
from okdc.anatomy.stages import is_part, is_sequence, outermost, runs
from okdc.cohort.refit import refit


class Chain(nn.Module):
    """A module followed by further ones; it stands where `first` stood and answers for it."""

    def __init__(self, first: nn.Module, further: list[nn.Module]) -> None:
        super().__init__()
        self.first = first
        self.further = nn.ModuleList(further)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = self.first(*args, **kwargs)
        for block in self.further:
            several = isinstance(x, (tuple, list)) and isinstance(args[0], Tensor)
            again = tuple(x)[: len(args)] if several else (x,)
            x = block(*again, *args[len(again) :], **kwargs)
        return x

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("first"), name)


class Skipped(nn.Module):
    """Stands where a shape-keeping block was taken away."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        return x


class ResidualConv(nn.Module):
    """The block for networks of maps that have none to repeat: x + bottleneck(x), (B, D, H, W) or (B, H, W, D)."""

    def __init__(self, width: int, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        inner = max(1, width // 4)
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
        )

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if self.channels_last:
            return x + self.body(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.body(x)


class ResidualAttention(nn.Module):
    """The block for networks of tokens that have none to repeat: x + attention(x), then x + MLP(x), (B, N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = math.gcd(width, max(1, width // 64))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


FALLBACKS = (ResidualConv, ResidualAttention)


def deepen(network: nn.Module, anatomy: Anatomy, stage: Stage, count: int) -> tuple[str, list[nn.Module]]:
    """Append `count` blocks to one stage of a sibling of the target; say which, and return them to be born.

    Copies of the stage's own last block, or blocks where they take turns, before the pooling if the stage pools. Where
    none keeps its shape, the last one, or else the last convolution with what follows it, is refitted to do so; where
    that fails, okdc's own block is appended.
    """
    if stage.blocks:
        place, blocks = stage.blocks[-1][-1], _copies(network, anatomy, stage, count)
        kind = "-".join(dict.fromkeys(_kind(block) for block in blocks))
    else:
        place, block = _refitted(network, anatomy, stage)
        block = _fallback(anatomy, stage) if block is None else block
        kind, blocks = _kind(block), [copy.deepcopy(block) for _ in range(count)]
    parent, _, leaf = place.rpartition(".")
    network.get_submodule(parent)._modules[leaf] = Chain(network.get_submodule(place), blocks)
    return f"{count} x {kind} after {place}", blocks


def shorten(network: nn.Module, stage: Stage, count: int) -> str:
    """Take the last `count` blocks of a stage of a sibling of the target away, as far as it has any, and say so."""
    taken = stage.blocks[-count:]
    for name in (name for run in taken for name in run):
        parent, _, leaf = name.rpartition(".")
        network.get_submodule(parent)._modules[leaf] = Skipped()
    return f"{len(taken)} fewer in {stage.first}" if taken else ""


def _kind(block: nn.Module) -> str:
    if type(block) is nn.Sequential:
        return "-".join(type(module).__name__ for module in block)
    return type(block).__name__


def _copies(network: nn.Module, anatomy: Anatomy, stage: Stage, count: int) -> list[nn.Module]:
    """Copies that go on with the stage's pattern: of its last block or, where blocks take turns, of the last few."""
    shapes = {c.name: c.output for c in anatomy.calls}
    whole = next(s for s in anatomy.stages if s.first == stage.first)  # also what of the stage is before the cut
    alike = [run for run in whole.blocks if shapes[run[-1]] == shapes[stage.blocks[-1][-1]]]
    runs = [[network.get_submodule(name) for name in run] for run in alike]
    turn = runs[-_period([[_signature(m) for m in run] for run in runs]) :]
    originals = [turn[i % len(turn)] for i in range(count)]
    return [copy.deepcopy(run[0]) if len(run) == 1 else nn.Sequential(*copy.deepcopy(run)) for run in originals]


def _period(signatures: list[Any]) -> int:
    """After how many blocks they repeat; 1 where they do not (shifted windows and other attention in turns: 2)."""
    for period in range(1, min(4, len(signatures) - 1) + 1):
        if signatures[-1] == signatures[-1 - period]:
            return period
    alternating = len(signatures) == 2 and _shape_of(signatures[0]) == _shape_of(signatures[1])
    return 2 if alternating else 1


def _shape_of(signature: list[Any]) -> list[Any]:
    return [kinds for kinds, _ in signature]


def _signature(block: nn.Module) -> tuple[Any, Any]:
    """What a block is made of, and how its parts are set: whole numbers, truth values and their tuples."""
    kinds = tuple(type(m).__name__ for m in block.modules() if not type(m).__name__.startswith(("Drop", "Identity")))
    settings = tuple(
        (key, value)
        for module in block.modules()
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and key != "training" and "ind" not in key and _is_setting(value)
    )
    return kinds, settings


def _is_setting(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(v, int) for v in value))


def _refitted(network: nn.Module, anatomy: Anatomy, stage: Stage) -> tuple[str, nn.Module | None]:
    """Where to append, and the stage's last block made to keep the shape there; None if it cannot be."""
    for place, names in _candidates(network, anatomy, stage):
        output, args, kwargs = _seen(network, anatomy, place, names[0])
        parts = [network.get_submodule(name) for name in names]
        block = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
        made = refit(block, output, args, kwargs)
        if made is not None:
            return place, made
    return stage.last, None


def _seen(network: nn.Module, anatomy: Anatomy, place: str, name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What the module `place` gives, and what the module `name` is called with, for images of noise."""
    outputs, inputs = [], []
    handles = [
        network.get_submodule(place).register_forward_hook(lambda m, args, y: outputs.append(y)),
        network.get_submodule(name).register_forward_pre_hook(lambda *seen: inputs.append(seen[1:]), with_kwargs=True),
    ]
    noise = torch.randn(2, *anatomy.input_size, generator=torch.Generator().manual_seed(0))
    try:
        with at_rest(network), torch.no_grad():
            network(noise.to(next(network.parameters())))
    finally:
        for handle in handles:
            handle.remove()
    return outputs[-1], *inputs[-1]


def _candidates(network: nn.Module, anatomy: Anatomy, stage: Stage) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where to append, and what could be refitted: the stage's last block, then its last convolution's run."""
    aspect, start = _aspect(anatomy), next(c.start for c in anatomy.calls if c.name == stage.first)
    inside = [c for c in anatomy.calls if c.start >= start and c.end <= stage.end]
    found = _last_block(network, [c for c in inside if not c.leaf], stage.size, aspect)
    if found is not None:
        yield found[0], (found[1],)
    for run in list(runs(dict(network.named_modules()), inside, stage.size, aspect, keeping=False))[-1:]:
        yield run[-1], run


def _last_block(network: nn.Module, inside: list[Call], size: int, aspect: float) -> tuple[str, str] | None:
    """The last module of a stage that gives its size and has weights; and in it, the last of its like, or itself."""
    inside = [c for c in inside if not is_sequence(network.get_submodule(c.name))]
    sized = [c for c in inside if same_size(positions(c.output, aspect), size) and c.flops_end > c.flops_start]
    outer = [c for c in outermost(sized) if not is_part(c)]
    if not outer:
        return None
    place = block = outer[-1]
    while True:
        parts = outermost([c for c in inside if block.start < c.start and c.end < block.end and not is_part(c)])
        alike = [c for c in parts if _makes_up(block, [other for other in parts if other.kind == c.kind])]
        if not alike and not ("Stage" in block.kind and len(parts) == 1):
            return place.name, block.name
        block = alike[-1] if alike else parts[-1]


def _makes_up(block: Call, parts: list[Call]) -> bool:
    """Whether these parts are several, and most of what the block computes."""
    return len(parts) > 1 and 2 * sum(c.flops_end - c.flops_start for c in parts) > block.flops_end - block.flops_start


def _aspect(anatomy: Anatomy) -> float:
    return anatomy.input_size[-2] / anatomy.input_size[-1]


def _fallback(anatomy: Anatomy, stage: Stage) -> nn.Module:
    shape = next(c.output for c in reversed(anatomy.calls) if c.name == stage.last)
    assert shape is not None
    where = layout(shape, _aspect(anatomy))
    if where == "tokens":
        return ResidualAttention(shape[-1])
    return ResidualConv(shape[-1] if where == "nhwc" else shape[0], where == "nhwc")
