"""The target with its branches: the trunk runs once and is recorded, every branch replays it; strip undoes it.

The target is run whole, as the user wrote it. A branch is another full network of the same family in which the modules
before the cut are `Replay`s that return what was recorded, so its own forward code runs unchanged and costs only its
tail. Nothing is traced. Attach and strip are both in this file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from okdc.anatomy import Anatomy, inspect
from okdc.anatomy.modes import at_rest, resting, unchanged
from okdc.anatomy.shapes import layout
from okdc.cohort.birth import born, grow
from okdc.cohort.proof import (
    prove,
    refuse_by_chance,
    refuse_by_data,
    refuse_other_ways,
    refuse_own_modules,
    ways_in_training,
)
from okdc.cohort.replay import Handling, Record, Tap, Tape, as_map
from okdc.cohort.trunk import before, on_its_own, stand_in, tie_unused
from okdc.cohort.width import narrow
from okdc.errors import CutError, NetworkError
from okdc.tasks.outputs import described


@dataclass(frozen=True)
class CohortOutput:
    """What M members said about one batch: tuples of M tensors, member 0 is the target."""

    logits: tuple[Tensor, ...]  # (B, C)
    feature_maps: tuple[Tensor, ...] = ()  # (B, D, H, W); tokens are (B, D, N, 1); empty unless tapped
    embeddings: tuple[Tensor, ...] = ()  # (B, D); empty unless tapped
    shared: Tensor | None = None  # what the trunk gave at the (first branch's) cut, a map as above; None unless tapped
    teacher: Tensor | None = None  # (B, C), a constant, of a network outside the cohort; None where there is none
    stage_maps: tuple[tuple[Tensor, ...], ...] = ()  # of each member, its stages' outputs after the cut, as maps above


@dataclass(frozen=True)
class Branch:
    """The plan of one auxiliary member.

    `cut` is the module after which it parts (None: it shares nothing, a peer network), `extra_blocks` how many blocks
    are appended to each stage that it has for itself, early to late (or, negative, taken away), `network` another
    architecture for a peer, `width` the share of its channels that it keeps (above 0, at most 1; it needs okdc[prune]),
    `parent` the member from which it parts, an earlier one: another than the target makes a tree.
    """

    cut: str | None = None
    extra_blocks: tuple[int, ...] = ()
    network: nn.Module | None = None
    width: float = 1.0
    parent: int = 0


@dataclass(frozen=True)
class Cost:
    """What one network costs: its parameters, those of them that are its own, and the FLOPs that it adds per image."""

    name: str
    params: int
    own_params: int
    flops: int
    grown: str  # what it has that the target has not, or what it is
    cut: str | None = None  # where it parts, in words
    frozen: bool = False  # run, not trained


class Cohort(nn.Module):
    """A target and its auxiliary members, run together; member 0 is the user's own object, whole and unchanged.

    `example` (B >= 2, C, H, W) is what the members are proved on: a branch is accepted only if with equal weights its
    logits equal the target's, in evaluation and in training mode. Otherwise CutError, and the target is left as it was.
    `fresh` makes another network like the target with new weights; without it branches are redrawn copies.
    `trunk_gradient` is what the trunk gets of its members' gradients: their sum, or at each cut their mean.
    """

    def __init__(
        self,
        target: nn.Module,
        example: Tensor,
        branches: Sequence[Branch] = (),
        *,
        taps: Sequence[str] = (),
        pretrained: bool = False,
        fresh: Callable[[], nn.Module] | None = None,
        trunk_gradient: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__()
        self.target = target
        shared = any(b.cut or b.extra_blocks or b.width < 1 for b in branches)
        self.anatomy = inspect(target, example, logits_only=not (shared or taps))
        self.taps = tuple(taps)
        self.pretrained = pretrained
        self.widths = (1.0, *(b.width for b in branches))
        self.tape = Tape()
        self._hooks: list[Any] = []
        self._resting: list[nn.Module] = []
        self.cut = next((b.cut for b in branches if b.cut), None)  # of the first branch; None: nothing is shared
        places = sorted({b.cut for b in branches if b.cut}, key=lambda cut: self.anatomy.find_cut(cut).flops_after)
        cuts = {cut: before(target, self.anatomy, cut) for cut in places}  # late ones first
        proofs = {cut: _copy(target) for cut in cuts}  # copies are made before any hook stands on the target
        siblings = [b.network or _sibling(target, None if pretrained else fresh) for b in branches]
        redrawn = [b.network is None and (pretrained or fresh is None) for b in branches]
        for copied in [*proofs.values(), *(s for s, redraw in zip(siblings, redrawn, strict=True) if redraw)][:1]:
            refuse_own_modules(target, copied, example)
        try:
            self._record({name: module for found in cuts.values() for name, module in found.items()}, self.tape)
            self._ways = ways_in_training(target, example) if places or taps else []
            for cut in places[:1]:
                refuse_by_data(target, self.anatomy, cut, example)
                refuse_by_chance(self._ways, cuts[cut], self.anatomy, cut)
            for cut, network in proofs.items():
                stand_in(network, cuts[cut], self.tape, cut)
                prove(target, network, self.anatomy, cut, self.tape, example)
                if trunk_gradient == "mean":  # what was found until now is of this cut, and of later ones alone
                    refuse_other_ways(network, self.anatomy, cut, self.tape, [cut])
            for cut, network in proofs.items() if len(proofs) > 1 else ():
                prove(target, network, self.anatomy, cut, self.tape, example)  # with what the other cuts need, too
                if trunk_gradient == "mean":
                    refuse_other_ways(network, self.anatomy, cut, self.tape, places)
            parents = {0, *(b.parent for b in branches)}
            tapes = {parent: self.tape.below() if parent else self.tape for parent in parents}
            for plan in branches if trunk_gradient == "mean" else ():
                if plan.cut:
                    children = sum((b.parent, b.cut) == (plan.parent, plan.cut) for b in branches)
                    tapes[plan.parent].divisor[plan.cut] = 1 + children
            family = [target, *siblings]
            self.grown = [
                self._finish(i, branches, family, tapes, cuts, redraw, pretrained, example)
                for i, redraw in enumerate(redrawn, 1)
            ]
            self.branches = nn.ModuleList(siblings)
            self._resting = [module for member in self.members for module in resting(member)]
            self._tap(branches, example)
            self.costs = self._measure(example, [None, *(_parting(b) for b in branches)])
            self._try_training(example)
        except BaseException:
            self.strip()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        return ("target", *(f"branch{i + 1}" for i in range(len(self.branches))))

    @property
    def members(self) -> tuple[nn.Module, ...]:
        return (self.target, *self.branches)

    def __len__(self) -> int:
        return 1 + len(self.branches)

    def forward(self, images: Tensor) -> CohortOutput:
        """What the members say of the same images (B, C, H, W), or each of its own view (M, B, C, H, W) of them.

        With views the trunk runs once for each member, so that batch norm sees one view at a time; CutError where it
        takes the mean of its members' gradients.
        """
        tape, views = self.tape, images.dim() == 5
        if views and tape.divisor:
            raise CutError(
                f"a view for each member, images {tuple(images.shape)}, came to a cohort whose trunk takes the mean of "
                "its members' gradients, and with views the trunk runs once for each. Give images (batch, channels, "
                "height, width), or make the cohort with trunk_gradient='sum'."
            )
        tape.start(alone=views)
        try:
            logits = []
            for i, member in enumerate(self.members):
                tape.rewind()
                logits.append(member(images[i] if views else images))
            maps, embeddings = self._tapped("feature_map"), self._tapped("embedding")
            shared = None if views else self._shared()
            return CohortOutput(tuple(logits), maps, embeddings, shared, stage_maps=self._stage_maps())
        finally:
            tape.clear()

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for what came in evaluation mode with its parameters frozen, in the target and copies."""
        super().train(mode)
        for module in self._resting:
            module.eval()
        return self

    def strip(self) -> nn.Module:
        """The very object that came in, trained, with nothing of the cohort left on it."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        return self.target

    def extract(self, index: int) -> nn.Module:
        """Member `index` (0 is the target) as a network of its own: a copy that owes nothing to the cohort.

        To be called before `strip`. NetworkError if it gives other logits than in the cohort, because weights of its
        own also serve before the cut.
        """
        network = on_its_own(self.members[index])
        noise = torch.randn(2, *self.anatomy.input_size, generator=torch.Generator().manual_seed(0))
        images = noise.to(next(network.parameters()))
        with unchanged(self), unchanged(network), torch.no_grad():
            expected, logits = self.eval()(images).logits[index], network.eval()(images)
        if not (logits - expected).abs().max() <= 1e-3 * expected.abs().max().clamp_min(1e-12):
            raise NetworkError(
                f"the {self.names[index]} of {self.anatomy.name} is no network by itself: weights of its own serve on "
                f"both sides of {self.cut!r}. "
                + self.anatomy.ways_out(self.cut, "train whole peer networks: --share none")
            )
        return network

    def _tapped(self, kind: str) -> tuple[Tensor, ...]:
        return tuple(self._look(kind, i) for i in range(len(self))) if kind in self.taps else ()

    def _look(self, kind: str, member: int) -> Tensor:
        if (kind, member) not in self.tape.tapped:
            raise CutError(_untapped(f"the {kind.replace('_', ' ')}'s module of the {self.names[member]}"))
        return self.tape.tapped[kind, member]

    def _stage_maps(self) -> tuple[tuple[Tensor, ...], ...]:
        return tuple(tuple(self._look(f"stage{s}", i) for s in range(n)) for i, n in enumerate(self._stages_tapped))

    def _shared(self) -> Tensor | None:
        return as_map(self.tape.outputs[self.cut][0], self._shared_layout) if self.cut and self._shared_layout else None

    def _record(self, trunk: dict[str, nn.Module], tape: Tape) -> None:
        for name, module in trunk.items():
            tape.handling.setdefault(name, Handling())
            self._hooks.append(module.register_forward_hook(Record(tape, name)))

    def _tap(self, branches: Sequence[Branch], example: Tensor) -> None:
        self._shared_layout = self._layout_at_cut() if "shared" in self.taps else None
        self._stages_tapped: list[int] = []
        foreign = [False, *(plan.network is not None for plan in branches)]
        cuts = [self.cut, *(plan.cut for plan in branches)]
        for i, member in enumerate(self.members if self.taps else ()):
            anatomy = inspect(member, example) if foreign[i] else self.anatomy
            places: list[tuple[str, str, str]] = []
            if "feature_map" in self.taps:
                places.append(("feature_map", anatomy.feature_map, anatomy.layout))
            if "embedding" in self.taps:
                places.append(("embedding", anatomy.classifier, anatomy.layout))
            if "stages" in self.taps:
                outputs = _stage_outputs(anatomy, cuts[i])
                self._stages_tapped.append(len(outputs))
                places += [(f"stage{s}", name, where) for s, (name, where) in enumerate(outputs)]
            for kind, name, where in places:
                if not (foreign[i] or all(way[name] for way in self._ways)):
                    raise CutError(_untapped(f"{name!r} of {anatomy.name}"))
                module, tap = member.get_submodule(name), Tap(self.tape, kind, i, where)
                attach = module.register_forward_pre_hook if kind == "embedding" else module.register_forward_hook
                self._hooks.append(attach(tap))

    def _layout_at_cut(self) -> str:
        """Where the channels of the cut's output are; CutError when nothing is shared or it is no map and no tokens."""
        if self.cut is None:
            raise CutError(
                "this method looks at what the branches share, and nothing is shared. Leave out --share none and "
                "--peers, and give it at least 2 --members."
            )
        shape = self.anatomy.find_cut(self.cut).shape
        if len(shape) not in (2, 3) or not self.tape.handling[self.cut].live:
            raise CutError(
                f"this method looks at what the branches share, and {self.cut!r} gives {shape or 'no single tensor'}, "
                "expected a map or tokens. "
                + self.anatomy.ways_out(self.cut, "choose a method that looks at logits alone, such as --method dml")
            )
        return layout(shape, self.anatomy.input_size[-2] / self.anatomy.input_size[-1])

    def _finish(
        self,
        member: int,
        branches: Sequence[Branch],
        family: Sequence[nn.Module],
        tapes: dict[int, Tape],
        cuts: dict[str, dict[str, nn.Module]],
        redraw: bool,
        pretrained: bool,
        example: Tensor,
    ) -> str:
        """Make a sibling of the target the branch that was planned; how it differs from the target, in words."""
        network, plan = family[member], branches[member - 1]
        if plan.network is not None:
            return type(network).__name__
        stages = self.anatomy.stages_after(plan.cut) if plan.cut else self.anatomy.stages
        if redraw:
            born(network, pretrained)
        # Appended blocks first: they may stand after modules that are about to be replaced.
        grown = [grow(network, self.anatomy, s, n, pretrained) for s, n in zip(stages, plan.extra_blocks) if n]
        if plan.width < 1:
            trunk = cuts[plan.cut] if plan.cut else {}
            grown.append(narrow(network, self.anatomy, plan.cut, trunk, plan.width, example))
        if plan.cut:
            trunk = {name: family[plan.parent].get_submodule(name) for name in cuts[plan.cut]}
            if plan.parent and all(b.parent != plan.parent for b in branches[: member - 1]):  # for all its children
                names = {name for b in branches if b.parent == plan.parent and b.cut for name in cuts[b.cut]}
                self._record({name: family[plan.parent].get_submodule(name) for name in names}, tapes[plan.parent])
            stand_in(network, trunk, tapes[plan.parent], plan.cut)
            tie_unused(network, _lineage(plan, branches, family), self.tape, example)
        return ", ".join(grown)

    def _measure(self, example: Tensor, cuts: Sequence[str | None]) -> tuple[Cost, ...]:
        """Run every member once; the FLOPs of a branch are those of its own tail."""
        costs, seen, flops = [], set[int](), []
        with unchanged(self), at_rest(self), torch.no_grad():
            self.tape.start()
            for member in self.members:
                self.tape.rewind()
                with FlopCounterMode(display=False) as counter:
                    member(example)
                flops.append(counter.get_total_flops() // len(example))
            self.feature_widths = tuple(x.shape[1] for x in self._tapped("feature_map"))
            self.embedding_widths = tuple(x.shape[1] for x in self._tapped("embedding"))
            self.stage_widths = tuple(tuple(x.shape[1] for x in maps) for maps in self._stage_maps())
            shared = self._shared()
            self.shared_width = 0 if shared is None else shared.shape[1]
            self.tape.clear()
        grown = ["", *self.grown]
        for name, member, spent, has, cut in zip(self.names, self.members, flops, grown, cuts, strict=True):
            own = sum(p.numel() for p in member.parameters() if id(p) not in seen)
            seen |= {id(p) for p in member.parameters()}
            costs.append(Cost(name, sum(p.numel() for p in member.parameters()), own, spent, has, cut))
        return tuple(costs)

    def _try_training(self, example: Tensor) -> None:
        """Run every member once in training mode, where some networks return more than logits."""
        with unchanged(self), torch.no_grad():
            outputs = self.train()(example).logits
        for name, member, logits in zip(self.names, self.members, outputs, strict=True):
            if not (isinstance(logits, Tensor) and logits.dim() == 2):
                raise NetworkError(
                    f"the {name}, {type(member).__name__}, returns {described(logits)} in training mode; expected one "
                    "tensor of logits (batch, classes) as in evaluation mode. Turn its auxiliary outputs off."
                )


def _stage_outputs(anatomy: Anatomy, cut: str | None) -> list[tuple[str, str]]:
    """The module that each stage after the cut ends with, and the layout of its output, early to late."""
    shapes = {c.name: c.output for c in anatomy.calls}
    aspect = anatomy.input_size[-2] / anatomy.input_size[-1]
    ends = [stage.last for stage in (anatomy.stages_after(cut) if cut else anatomy.stages)]
    return [(name, layout(shape, aspect)) for name in ends if len(shape := shapes[name] or ()) in (2, 3)]


def _untapped(what: str) -> str:
    return (
        f"the method looks at what {what} gives, and in training mode that is not called in every pass. Let it run for "
        "each batch, or choose a method that looks at logits alone, such as --method dml."
    )


def _parting(plan: Branch) -> str | None:
    return f"{plan.cut} of branch{plan.parent}" if plan.parent else plan.cut


def _lineage(plan: Branch, branches: Sequence[Branch], family: Sequence[nn.Module]) -> list[nn.Module]:
    """The members that run before a branch because it parts from them, the target first."""
    found = [plan.parent]
    while found[0]:
        found.insert(0, branches[found[0] - 1].parent)
    return [family[member] for member in found]


def _copy(target: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(target)
    except Exception as error:
        raise NetworkError(
            f"{type(target).__name__} cannot be copied ({error}), and branches are copies of the target. Store only "
            "modules, leaf tensors and plain values on it, or give its name or factory instead of the object."
        ) from error


def _sibling(target: nn.Module, fresh: Callable[[], nn.Module] | None) -> nn.Module:
    """Another network like the target: newly made where its maker is known, else a copy (to be redrawn)."""
    if fresh is None:
        return _copy(target)
    network = fresh()
    made = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    wanted = {k: tuple(v.shape) for k, v in target.state_dict().items()}
    if made != wanted:
        key = next(k for k in {**wanted, **made} if made.get(k) != wanted.get(k))
        raise NetworkError(
            f"`fresh` makes another network than the target, {type(target).__name__}: {key} is "
            f"{made.get(key, 'missing')} in it, and {wanted.get(key, 'missing')} in the target. Give a function that "
            "makes the target anew, or leave it out: branches are then redrawn copies."
        )
    for mine, theirs in zip(network.parameters(), target.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return network.to(next(target.parameters()).device)
