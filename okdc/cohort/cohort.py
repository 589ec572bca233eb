"""The target with its branches: the trunk runs once and is recorded, every branch replays it; strip undoes it.

The target is run whole, as the user wrote it. A branch is another full network of the same family in which the modules
before the cut are `Replay`s that return what was recorded, so its own forward code runs unchanged and costs only its
tail. Nothing is traced. Attach and strip are both in this file.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from okdc import tasks
from okdc.anatomy import Anatomy, inspect
from okdc.anatomy.modes import at_rest, resting, unchanged
from okdc.cohort.birth import differ
from okdc.cohort.hooks import ALONG, Hooks
from okdc.cohort.known import Found, Known, proved
from okdc.cohort.plan import UNTAPPED, Branch, CohortOutput, Cost, lineage, member_name
from okdc.cohort.proof import prove_all, refuse_own_modules, ways_in_training
from okdc.cohort.replay import Handling, Record, Tape
from okdc.cohort.siblings import copy_of, sibling
from okdc.cohort.taps import Taps, checked, checked_modules
from okdc.cohort.trunk import before, on_its_own, stand_in, tie_unused
from okdc.errors import CutError, NetworkError, counted
from okdc.tasks.shared.outputs import described
from okdc.tasks.task import Task


class Cohort(nn.Module):
    """A target and its auxiliary members, run together; member 0 is the user's own object, whole and unchanged.

    `example` (B >= 2, C, H, W) is what the members are proved on: a branch is accepted only if with equal weights its
    logits equal the target's, in evaluation and in training mode. Otherwise CutError, and the target is left as it was.
    `fresh` makes another network like the target with new weights; without it branches are redrawn copies.
    `tapped` names modules, {"early": "layer1.1"}: what they give is looked at in each member that has them.
    `trunk_gradient` is what the trunk gets of its members' gradients: their sum, or at each cut their mean.
    `anatomy` is what `inspect` found out about the target on images of this size; without it the target is inspected.
    `task` is what the networks are for, by default classification.
    `known` may know what the proof of an equal cohort found (`okdc.cohort.known`), so that it is not made again.
    """

    target: nn.Module
    """Member 0, the object that came in."""
    branches: nn.ModuleList
    """The auxiliary members."""
    anatomy: Anatomy
    """What is known of the target: its stages, its classifier, `num_classes`, `input_size` (C, H, W)."""
    taps: tuple[str, ...]
    """What is looked at beside logits."""
    widths: tuple[float, ...]
    """The share of its channels that each member keeps, 1 for the target."""
    cut: str | None
    """Where the first branch parts; None where nothing is shared."""
    costs: tuple[Cost, ...]
    """What each member costs."""
    feature_widths: tuple[int, ...]
    """D of each member's feature map, where these are tapped."""
    embedding_widths: tuple[int, ...]
    """D of each member's embedding, where these are tapped."""
    stage_widths: tuple[tuple[int, ...], ...]
    """D of the map of each stage of each member, where these are tapped."""
    exit_shapes: tuple[tuple[int, ...], ...]
    """(D, H, W) of each map at which the target could be left early, where these are tapped."""
    shared_width: int
    """D of what the trunk gives, 0 where that is not tapped."""
    tapped_shapes: tuple[dict[str, tuple[int, ...]], ...]
    """Of each member, the shapes without the batch of what modules with names give, where that is a tensor."""

    def __init__(
        self,
        target: nn.Module,
        example: Tensor,
        branches: Sequence[Branch] = (),
        *,
        taps: Sequence[str] = (),
        tapped: Mapping[str, str] | None = None,
        pretrained: bool = False,
        fresh: Callable[[], nn.Module] | None = None,
        trunk_gradient: Literal["sum", "mean"] = "sum",
        anatomy: Anatomy | None = None,
        task: Task | None = None,
        known: Known | None = None,
    ) -> None:
        super().__init__()
        self.target, self.task = target, task or tasks.get()
        needs_parts = bool(taps) or any(b.cut or b.extra_blocks or b.width < 1 or b.outputs for b in branches)
        self.anatomy = _known(anatomy, target, example, needs_parts, self.task)
        self.taps, self._modules_tapped = checked(taps), checked_modules(tapped or {}, target, self.anatomy)
        self.pretrained = pretrained
        self.widths = (1.0, *(b.width for b in branches))
        self.tape = Tape()
        self._hooks = Hooks()
        self._stripped = False
        self.proof: tuple[str, Found] | None = None  # for `known` of another run
        self._resting: list[nn.Module] = []
        self._names = ("target", *(member_name(i, b.cut is not None) for i, b in enumerate(branches, 1)))
        self.cut = next((b.cut for b in branches if b.cut), None)
        trunks = _trunks(target, self.anatomy, branches)
        proofs = {cut: copy_of(target) for cut in trunks}  # copies are made before any hook stands on the target
        siblings = [b.network or sibling(target, None if pretrained else fresh) for b in branches]
        redrawn = [b.network is None and (pretrained or fresh is None) for b in branches]
        for copied in [*proofs.values(), *(s for s, redraw in zip(siblings, redrawn, strict=True) if redraw)][:1]:
            refuse_own_modules(target, copied, example)
        mean = trunk_gradient == "mean"
        try:
            self._record({name: module for trunk in trunks.values() for name, module in trunk.items()}, self.tape)
            ways = ways_in_training(target, example) if trunks or taps or tapped else []
            prove = partial(
                prove_all, target, proofs, trunks, self.anatomy, self.tape, ways, example, self.task, one_way=mean
            )
            if trunks and known:
                self.proof = proved(known, prove, self.tape, target, trunks, example, self.task.name, mean)
            else:
                prove()
            self.branches = nn.ModuleList(siblings)
            self.grown = self._grow(branches, trunks, example, redrawn, mean)
            self._resting = [module for member in self.members for module in resting(member)]
            self._tap(branches, ways, example)
            self.costs = self._measure(example, branches)
            self._try_training(example)
        except BaseException:
            self.strip()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @property
    def members(self) -> tuple[nn.Module, ...]:
        return (self.target, *self.branches)

    def __len__(self) -> int:
        return 1 + len(self.branches)

    def forward(self, images: Tensor) -> CohortOutput:
        """What the members say of the same images (B, C, H, W), or each of its own view (M, B, C, H, W) of them.

        With views the trunk runs once for each member, so that batch norm sees one view at a time; CutError where it
        takes the mean of its members' gradients, for another number of views, and after `strip`.
        """
        if self._stripped:
            raise CutError(
                "this cohort was stripped: its branches have no trunk any more, and nothing is tapped. Run the network "
                "that strip() gave, or make a new cohort (okdc.build)."
            )
        tape, views = self.tape, images.dim() == 5
        if views and tape.divisor:
            raise CutError(
                f"a view for each member, images {tuple(images.shape)}, came to a cohort whose trunk takes the mean of "
                "its members' gradients, and with views the trunk runs once for each. Give images (batch, channels, "
                "height, width), or make the cohort with trunk_gradient='sum' (--trunk-gradient sum)."
            )
        if views and len(images) != len(self):
            raise CutError(
                f"{len(images)} views of each image came to a cohort of {counted(len(self), 'member')}, and it takes "
                "one for each. A method that says how many views it needs writes `forward(self, images, labels)`, and "
                "runs the cohort on one of them: self.cohort(images[0])."
            )
        tape.start(alone=views)
        try:
            given = []
            for i, member in enumerate(self.members):
                tape.rewind()
                given.append(member(images[i] if views else images))
            logits, earlier = tuple(map(self.task.result, given)), tuple(map(self.task.earlier, given))
            return CohortOutput(logits, **{**UNTAPPED, **self._tapped.found(views)}, earlier=earlier)
        finally:
            tape.clear()

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for what came in evaluation mode with its parameters frozen, in the target and copies."""
        super().train(mode)
        for module in self._resting:
            module.eval()
        return self

    def __deepcopy__(self, memo: dict[Any, Any]) -> Self:
        """A copy that is hooked as this one is; of its members alone, copies are not."""
        copied = memo[id(self)] = type(self).__new__(type(self))
        memo[ALONG] = True
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def strip(self) -> nn.Module:
        """The very object that came in, trained, with nothing of the cohort left on it."""
        self._stripped = True
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

    def _record(self, trunk: dict[str, nn.Module], tape: Tape) -> None:
        for name, module in trunk.items():
            tape.handling.setdefault(name, Handling())
            self._hooks.add(module, Record(tape, name))

    def _grow(
        self,
        branches: Sequence[Branch],
        trunks: dict[str, dict[str, nn.Module]],
        example: Tensor,
        redrawn: Sequence[bool],
        mean: bool,
    ) -> list[str]:
        """Make each sibling of the target the branch that was planned; how each differs from the target, in words."""
        grown, tapes = [], self._tapes(branches, mean)
        for i, (plan, network, redraw) in enumerate(zip(branches, self.branches, redrawn, strict=True), 1):
            trunk = trunks[plan.cut] if plan.cut else {}
            if plan.network is not None:
                grown.append(type(network).__name__)
                continue
            grown.append(differ(network, plan, self.anatomy, trunk, example, redraw, self.pretrained))
            if plan.cut:
                parent = self.members[plan.parent]
                stand_in(network, {n: parent.get_submodule(n) for n in trunk}, tapes[plan.parent], plan.cut)
                tie_unused(network, [self.members[m] for m in lineage(branches, i)], self.tape, example)
            if i in tapes:
                names = {name for b in branches if b.parent == i and b.cut for name in trunks[b.cut]}
                self._record({name: network.get_submodule(name) for name in names}, tapes[i])
        return grown

    def _tapes(self, branches: Sequence[Branch], mean: bool) -> dict[int, Tape]:
        """The tape of every member from which others part, where the gradients that they send it may be divided."""
        tapes = {parent: self.tape.below() if parent else self.tape for parent in {0, *(b.parent for b in branches)}}
        for plan in branches if mean else ():
            if plan.cut:
                children = sum((b.parent, b.cut) == (plan.parent, plan.cut) for b in branches)
                tapes[plan.parent].divisor[plan.cut] = 1 + children
        return tapes

    def _tap(self, branches: Sequence[Branch], ways: list[Counter[str]], example: Tensor) -> None:
        """Have the members' layers tapped; the target's own stages are those after the first branch's cut."""
        self._tapped = Taps(self.taps, self._modules_tapped, self.tape, self.anatomy, self.cut)
        looked = self.taps or self._modules_tapped
        for member, plan in zip(self.members, (Branch(self.cut), *branches)) if looked else ():
            foreign = plan.network is not None
            anatomy = inspect(member, example, logits_only=not self.taps, task=self.task) if foreign else self.anatomy
            tapped = self._tapped.of_next(anatomy, plan.cut, [] if foreign else ways)
            for name, tap in tapped + self._tapped.modules_of_next(member, anatomy, plan.parent):
                self._hooks.add(member.get_submodule(name), tap, before=tap.kind == "embedding")

    def _measure(self, example: Tensor, branches: Sequence[Branch]) -> tuple[Cost, ...]:
        """Run every member once; the FLOPs of a branch are those of its own tail."""
        costs, seen, flops = [], set[int](), []
        with unchanged(self), at_rest(self), torch.no_grad():
            self.tape.start()
            for member in self.members:
                self.tape.rewind()
                with FlopCounterMode(display=False) as counter:
                    member(example)
                flops.append(counter.get_total_flops() // len(example))
            found = self._tapped.found(alone=False)
            self.feature_widths = tuple(x.shape[1] for x in found.get("feature_maps", ()))
            self.embedding_widths = tuple(x.shape[1] for x in found.get("embeddings", ()))
            self.stage_widths = tuple(tuple(x.shape[1] for x in maps) for maps in found.get("stage_maps", ()))
            self.exit_shapes = tuple(tuple(x.shape[1:]) for x in found.get("exit_maps", ()))
            self.shared_width = found["shared"].shape[1] if "shared" in found else 0
            self.tapped_shapes = tuple(
                {key: tuple(x.shape[1:]) for key, x in given.items() if isinstance(x, Tensor)}
                for given in found.get("tapped", ())
            )
            self.tape.clear()
        grown, cuts = ["", *self.grown], [None, *(b.parting for b in branches)]
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
            if not self.task.is_output(logits):
                raise NetworkError(
                    f"the {name}, {type(member).__name__}, returns {described(logits)} in training mode; expected "
                    f"{self.task.output} as in evaluation mode. Turn its auxiliary outputs off."
                )


def _known(anatomy: Anatomy | None, target: nn.Module, example: Tensor, needs_parts: bool, task: Task) -> Anatomy:
    """The anatomy that was given, or what is found out now; NetworkError for one of another network or image size."""
    if anatomy is None or (needs_parts and not anatomy.stages):  # why it has no parts, `inspect` says
        return inspect(target, example, logits_only=not needs_parts, task=task)
    given, size = (anatomy.name, anatomy.params, anatomy.input_size), tuple(example.shape[1:])
    if given != (type(target).__name__, sum(p.numel() for p in target.parameters()), size):
        raise NetworkError(
            f"the anatomy is that of {anatomy.name} ({anatomy.params:,} parameters) on images {anatomy.input_size}, "
            f"and the target is {type(target).__name__} on images {size}. Give inspect(target, example), or leave "
            "anatomy out."
        )
    return anatomy


def _trunks(target: nn.Module, anatomy: Anatomy, branches: Sequence[Branch]) -> dict[str, dict[str, nn.Module]]:
    """What is before each cut, the late cuts first."""
    cuts = sorted({b.cut for b in branches if b.cut}, key=lambda cut: anatomy.find_cut(cut).flops_after)
    return {cut: before(target, anatomy, cut) for cut in cuts}
