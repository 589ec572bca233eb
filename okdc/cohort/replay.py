"""Record and replay: what the trunk returned, module by module, and the stand-ins that return it again in a branch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from okdc.cohort.hooks import Hook
from okdc.errors import CutError
from okdc.system.randomness import random_state, set_random_state


@dataclass
class Handling:
    """How one module's output travels: `live` if it reaches a branch's logits; cloned where it is changed in place."""

    live: bool = False
    clone_recorded: bool = False
    clone_replayed: bool = False

    def add(self, live: bool, clone_recorded: bool, clone_replayed: bool) -> None:
        """What one cut's proof found; what another cut needs stays."""
        self.live |= live
        self.clone_recorded |= clone_recorded
        self.clone_replayed |= clone_replayed


@dataclass
class Proof:
    """What is watched while a cut is being proved: random states, in-place changes, and which outputs matter."""

    probing: bool = False
    random_states: dict[str, list[Any]] = field(default_factory=dict)
    recorded: list[tuple[str, Tensor, int]] = field(default_factory=list)  # name, tensor, its version then
    replayed: list[tuple[str, Tensor, int]] = field(default_factory=list)
    leaves: list[tuple[str, Tensor]] = field(default_factory=list)

    def probe(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of a replayed tensor whose gradient and version can be looked at afterwards."""
        leaf = tensor.detach()
        if leaf.is_floating_point():
            leaf = leaf.requires_grad_()
            self.leaves.append((name, leaf))
        copied = leaf.clone()
        self.replayed.append((name, copied, copied._version))
        return copied


class Tape:
    """What the trunk said in this forward pass, by module and call; a copy of a cohort gets a tape of its own."""

    def __init__(self) -> None:
        self.recording = False
        self.member = -1  # whose pass this is
        self.alone = False  # every member sees images of its own, and runs the trunk for itself
        self.outputs: dict[str, list[Any]] = {}
        self.position: dict[str, int] = {}
        self.tapped: dict[tuple[str, int], Any] = {}
        self.handling: dict[str, Handling] = {}
        self.divisor: dict[str, int] = {}  # of the gradients that members send into a trunk, by its cut; absent: 1
        self.proof: Proof | None = None
        self.inner: list[Tape] = []  # of branches from which others part: they start, rewind and end with this one

    def __deepcopy__(self, memo: dict[int, Any]) -> Tape:
        fresh = Tape()
        fresh.handling, fresh.divisor = self.handling, self.divisor
        memo[id(self)] = fresh
        fresh.inner = copy.deepcopy(self.inner, memo)
        return fresh

    def below(self) -> Tape:
        """A tape for a branch from which others part; what the proofs found of the target holds for its copies."""
        tape = Tape()
        tape.handling = self.handling
        self.inner.append(tape)
        return tape

    def start(self, alone: bool = False) -> None:
        self.clear()
        self.member = -1
        for tape in (self, *self.inner):
            tape.recording, tape.alone = True, alone

    def rewind(self) -> None:
        """Begin the next member: every module's first call is answered by its first output again."""
        self.member += 1
        for tape in (self, *self.inner):
            tape.position = {}

    def clear(self) -> None:
        for tape in (self, *self.inner):
            tape.recording = False
            tape.outputs, tape.position, tape.tapped = {}, {}, {}


class _Divided(torch.autograd.Function):
    """The same tensor, whose gradient is divided on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient / ctx.divisor, None


def divide_gradient(tensor: Tensor, divisor: int) -> Tensor:
    """The same values; the gradient that flows back through them is divided (CL-ILR, Song and Chai 2018)."""
    if divisor == 1 or not tensor.is_floating_point():
        return tensor
    return _Divided.apply(tensor, divisor)


class Record(Hook):
    """Forward hook that puts a trunk module's output on the tape, and divides the gradient of the target's own tail."""

    def __init__(self, tape: Tape, name: str) -> None:
        self.tape, self.name = tape, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        tape = self.tape
        if not tape.recording or tape.alone:
            return None
        handling = tape.handling[self.name]
        if tape.proof is not None:
            tape.proof.random_states.setdefault(self.name, []).append(random_state())
            if tape.proof.probing:
                tape.proof.recorded += [
                    (self.name, t, t._version) for t in tree_leaves(output) if isinstance(t, Tensor)
                ]
        recorded, probing = output, tape.proof is not None and tape.proof.probing
        if not (handling.live or probing):
            recorded = tree_map_only(Tensor, _shape_only, output)
        elif handling.clone_recorded or probing:
            recorded = tree_map_only(Tensor, torch.clone, output)
        tape.outputs.setdefault(self.name, []).append(_own_containers(recorded))
        divisor = tape.divisor.get(self.name, 1)
        if divisor == 1 or tape.proof is not None:
            return None
        output = tree_map_only(Tensor, lambda t: divide_gradient(t, divisor), output)
        # A divided view cannot be changed in place.
        return tree_map_only(Tensor, torch.clone, output) if handling.clone_recorded else output


def _own_containers(output: Any) -> Any:
    """The same tensors in lists and dictionaries of their own, which whoever is given them may change."""
    return output if isinstance(output, Tensor) else tree_map_only(Tensor, lambda tensor: tensor, output)


def _shape_only(tensor: Tensor) -> Tensor:
    """Zeros of the same shape that take no memory, for outputs that never reach the logits."""
    return tensor.new_zeros(()).expand(tensor.shape)


class Replay(nn.Module):
    """Stands in a branch for a trunk module, has no parameters, and returns what the target's own module returned.

    Where nothing is recorded, because each member sees images of its own, the target's module is run instead.
    """

    def __init__(self, tape: Tape, name: str, original: nn.Module, cut: str) -> None:
        super().__init__()
        self.tape, self.name, self.cut = tape, name, cut
        self._original = (original,)  # in a tuple, so that it is not registered as a part of the branch

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tape = self.tape
        if tape.alone or not tape.recording:
            return self._original[0](*args, **kwargs)
        position = tape.position.get(self.name, 0)
        tape.position[self.name] = position + 1
        outputs = tape.outputs.get(self.name, [])
        if position >= len(outputs):
            raise CutError(
                f"a branch that parts after {self.cut!r} calls {self.name!r}, and in this pass the target has "
                f"{'not' if not position else 'not again'}: which modules run before a cut may depend neither on "
                "chance nor on the images. Cut before it with --cut NAME, or train whole peer networks: --share none."
            )
        output = outputs[position]
        if tape.proof is not None:
            set_random_state(tape.proof.random_states[self.name][position])
            if tape.proof.probing:
                probe = tape.proof.probe
                return tree_map_only(Tensor, lambda t: probe(self.name, t), output)
        divisor = tape.divisor.get(self.cut, 1)
        if divisor > 1:
            output = tree_map_only(Tensor, lambda t: divide_gradient(t, divisor), output)
        if tape.handling[self.name].clone_replayed:
            output = tree_map_only(Tensor, torch.clone, output)
        return _own_containers(output)

    # Code that reads attributes or items of the module (patch_embed.grid_size, stages[0]) is answered by the original.
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # what Python asks of everything: how the original is copied is its own affair
                raise
            return getattr(self.__dict__["_original"][0], name)

    def __len__(self) -> int:
        return len(self._original[0])  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return self._original[0][index]  # type: ignore[index]

    def __bool__(self) -> bool:
        return True


class Tap(Hook):
    """Hook that keeps a module's output as a map, or as it is where `layout` is empty; or the classifier's input."""

    def __init__(self, tape: Tape, kind: str, layout: str = "") -> None:
        self.tape, self.kind, self.layout = tape, kind, layout

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if self.tape.recording:
            self.tape.tapped[self.kind, self.tape.member] = self._value(args, output)

    def _value(self, args: Any, output: Any) -> Any:
        if self.kind == "embedding":
            return as_vector(args[0])
        if self.layout:
            return as_map(output, self.layout)
        return tree_map_only(Tensor, torch.clone, output)  # which an in-place activation may be about to change


def as_vector(x: Tensor) -> Tensor:
    """(B, D) from what a classifier is given: a vector, or the mean of pixels (B, D, H, W) or of tokens (B, N, D)."""
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x


def as_map(x: Tensor, layout: str) -> Tensor:
    """(B, D, H, W) from nchw (B, D, H, W), nhwc (B, H, W, D), or tokens (B, N, D), which become (B, D, N, 1)."""
    if layout == "tokens":
        return x.transpose(1, 2).unsqueeze(-1)
    return x.permute(0, 3, 1, 2) if layout == "nhwc" else x
