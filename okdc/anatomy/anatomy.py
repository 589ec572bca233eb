"""What a network is made of: its stages, blocks, cuts, classifier and feature map, learned by running it once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from okdc import tasks
from okdc.anatomy.calls import Call, called_once, watch
from okdc.anatomy.classifier import classifiers, states_none
from okdc.anatomy.page import page
from okdc.anatomy.shapes import layout, positions
from okdc.anatomy.stages import Stage, find_stages, widest
from okdc.errors import NetworkError, nearest
from okdc.tasks.shared.outputs import described
from okdc.tasks.task import Task

MAX_TAIL = 0.6  # networks whose last stage, with the head, is a larger share of the FLOPs part between its blocks
MAX_CHOICE = 0.95  # cuts that share less than the rest are not offered
MIN_TAIL = 0.05  # a default cut leaves at least this share of the FLOPs to each branch


@dataclass(frozen=True)
class Cut:
    """A place to part: `name` is the module after which branches begin."""

    name: str
    shape: tuple[int, ...]
    flops_after: float  # share of the target's FLOPs (0 to 1)
    params_after: float


@dataclass(frozen=True, repr=False)
class Anatomy:
    """What `inspect` found out about a network; of one that only its logits are needed of, perhaps no parts."""

    name: str
    input_size: tuple[int, ...]
    num_classes: int
    params: int
    flops: int  # multiply-adds count as two
    calls: tuple[Call, ...]
    classifier: str = ""
    embedding: int = 0  # width of the classifier's input
    feature_map: str = ""  # the module whose output is the last map, or the last tokens, before pooling
    feature_shape: tuple[int, ...] = ()
    layout: str = ""  # nchw, nhwc or tokens
    stages: tuple[Stage, ...] = ()
    cuts: tuple[Cut, ...] = ()

    def __repr__(self) -> str:
        size = "x".join(map(str, self.input_size))
        return (
            f"<Anatomy: {self.name} for {size}, {self.num_classes} classes, {self.params:,} parameters, "
            f"{self.flops / 1e9:.3g} GFLOPs, {len(self.stages)} stages, {len(self.cuts)} cuts>"
        )

    def _repr_html_(self) -> str:
        try:
            choices, default = self.choices() if self.stages else [], self.cut() if self.stages else ""
        except NetworkError:  # nothing follows any cut that is worth training
            choices, default = [], ""
        return page(self, choices, default)

    def cut(self, private_stages: int = 1) -> str:
        """The cut that gives the last `private_stages` stages to every branch.

        Networks whose last stage is most of the network (a ViT) part after two thirds of their blocks instead.
        """
        last = self.stages[-1]
        if last.before is None or self.find_cut(last.before).flops_after > MAX_TAIL:
            return self._cut_between_blocks()
        candidates = [s.before for s in self.stages[-private_stages:] if s.before] + [
            s.before for s in reversed(self.stages[:-private_stages]) if s.before
        ]
        legal = {c.name for c in self._legal()}
        for name in candidates:
            if name in legal:
                return name
        return self._cut_by_cost()

    def choices(self) -> list[Cut]:
        """The cuts worth choosing from, early to late: the default, starts of stages, one or two places within each."""
        default, starts = self.find_cut(self.cut()), {s.before for s in self.stages}
        names = {name for s in self.stages for name in self._between_blocks(s, 3)} | starts
        kept: list[Cut] = []
        for cut in (c for c in self._legal() if c.name in names and c.flops_after < MAX_CHOICE):
            if kept and kept[-1].flops_after - cut.flops_after < 0.03:
                if cut.name not in starts and kept[-1].name in starts:
                    continue
                kept.pop()
            kept.append(cut)
        return sorted({default, *kept}, key=lambda c: -c.flops_after)

    def choices_in_words(self, but: str | None = None) -> str:
        """The names of `choices()`, without the cut `but`, and what each leaves to a branch; empty if there is none.

        Where `but` is the only choice, the other outermost modules.
        """
        default, outer = self.cut(), [c for c in self._legal() if "." not in c.name]
        cuts = [c for c in self.choices() if c.name != but] or [c for c in outer if c.name != but]
        words = [f"{c.name} ({c.flops_after:.0%}{', the default' * (c.name == default)})" for c in cuts]
        return f"{', '.join(words)}; in brackets what a branch has of the FLOPs" if words else ""

    def ways_out(self, cut: str | None, *others: str, how: str = "Cut elsewhere with --cut NAME, such as") -> str:
        """What to do where `cut` was refused, in sentences: another cut, if there is one to choose, or `others`."""
        where = self.choices_in_words(but=cut) if cut else ""
        ways = [f"{how} {where}", *others] if where else others
        words = " Or ".join(f"{way}." for way in ways)
        return words[:1].upper() + words[1:]

    def exits(self) -> tuple[str, ...]:
        """The cuts at which it could be left early: after each stage but the last.

        Of a network of one stage (a ViT), after a quarter, a half and three quarters of its blocks; of one without
        blocks, where branches part.
        """
        ends = [s.before for s in self.stages[1:]] or self._between_blocks(self.stages[-1], 4) or [self.cut()]
        shapes = {c.name: c.shape for c in self.cuts}
        return tuple(dict.fromkeys(name for name in ends if name and len(shapes.get(name, ())) in (2, 3)))

    def find_cut(self, name: str) -> Cut:
        """The cut called `name`; NetworkError with the nearest names when there is none."""
        for cut in self.cuts:
            if cut.name == name:
                return cut
        hint = nearest(name, [c.name for c in self.cuts])
        raise NetworkError(f"{self.name} cannot be cut after {name!r}.{hint} Good cuts: {self.choices_in_words()}.")

    def stages_after(self, cut: str) -> tuple[Stage, ...]:
        """The stages that a branch parting after `cut` has for itself, whole or in part, early to late."""
        ends = {c.name: c.end for c in self.calls}
        moment = ends[self.find_cut(cut).name]
        return tuple(
            replace(s, blocks=tuple(run for run in s.blocks if ends[run[-1]] > moment))
            for s in self.stages
            if s.end > moment and ends[s.last] > moment
        )

    def _legal(self) -> list[Cut]:
        """Cuts that leave a tail worth training, and in it a stage that can be made deeper."""
        ends = {c.name: c.end for c in self.calls}
        return [c for c in self.cuts if c.flops_after >= MIN_TAIL and ends[c.name] < ends[self.stages[-1].last]]

    def _cut_between_blocks(self) -> str:
        """After two thirds of the network's blocks, if that is in the last stage."""
        blocks, legal = self.stages[-1].blocks, {c.name for c in self._legal()}
        earlier = sum(len(s.blocks) for s in self.stages[:-1])
        index = max(0, math.ceil(2 * (earlier + len(blocks)) / 3) - earlier - 1)
        return blocks[index][-1] if len(blocks) > 2 and blocks[index][-1] in legal else self._cut_by_cost()

    def _between_blocks(self, stage: Stage, parts: int) -> list[str]:
        """The modules that end before a block of the stage begins, at most `parts` - 1 of them, evenly spread."""
        first = {c.name: c.start for c in self.calls}
        last = {c.name: c.end for c in self.calls}
        names = []
        for run in stage.blocks:
            ended = [c.name for c in self.cuts if last[c.name] < first[run[0]]]
            names += ended[-1:]
        names = [name for name in dict.fromkeys(names) if name != stage.before]
        return names if len(names) < parts else [names[len(names) * k // parts] for k in range(1, parts)]

    def _cut_by_cost(self) -> str:
        """The cut whose tail is nearest to a third of the FLOPs: between stages or blocks, else an outermost module."""
        legal = self._legal()
        if not legal:
            raise NetworkError(
                f"{self.name} has no module to part after: nothing follows that is worth training. "
                "Train whole peer networks instead: --share none."
            )
        names = {s.before for s in self.stages} | {name for s in self.stages for name in self._between_blocks(s, 99)}
        between = [c for c in legal if c.name in names]
        near = [c for c in legal if abs(c.flops_after - 1 / 3) < 0.15]
        candidates = [c for c in near if c.name in names] or near or between or legal
        least = min(c.name.count(".") for c in candidates)
        outer = candidates if candidates == between else [c for c in candidates if c.name.count(".") == least]
        return min(outer, key=lambda c: abs(c.flops_after - 1 / 3)).name


def inspect(
    network: nn.Module,
    example: Tensor | tuple[int, ...] | None = None,
    *,
    logits_only: bool = False,
    task: Task | None = None,
) -> Anatomy:
    """Run `network` once on `example` (B, C, H, W), or on noise of that (C, H, W) shape, and describe what it did.

    The network is left as it was: weights, buffers, mode. NetworkError if it does not give what a network of its
    task does, by default one (B, classes) tensor, and if it has no stages, feature map or classifier, unless its logits
    are all that is needed.
    """
    task = task or tasks.get()
    images = _example(network, example)
    calls, given = watch(network, images)
    logits = task.result(given)
    if not task.is_output(logits):
        raise NetworkError(
            f"{type(network).__name__} returned {described(logits)} for images {tuple(images.shape)}; "
            f"expected {task.output}. {task.advice(logits)}"
        )
    root = calls[-1]
    inner = [c for c in calls[:-1] if c.start > root.start]
    anatomy = Anatomy(
        name=type(network).__name__,
        input_size=tuple(images.shape[1:]),
        num_classes=logits.shape[1],
        params=sum(p.numel() for p in network.parameters()),
        flops=root.flops_end // images.shape[0],
        calls=tuple(inner),
    )
    try:
        return _with_parts(anatomy, network, root, images.shape[0])
    except NetworkError as error:
        if logits_only:
            return anatomy
        without = "A method that looks at logits alone does without: --method dml, --share none"
        raise NetworkError(f"{error} {without}.") from error


def _with_parts(anatomy: Anatomy, network: nn.Module, root: Call, batch: int) -> Anatomy:
    """The anatomy with its classifier, feature map, stages and cuts; NetworkError where there is no such thing."""
    inner, aspect = list(anatomy.calls), anatomy.input_size[-2] / anatomy.input_size[-1]
    classifier = _classifier(network, inner, anatomy.num_classes)
    feature = _feature_map(network, inner, classifier, aspect)
    stages = find_stages(network, inner, feature, classifier, aspect)
    return replace(
        anatomy,
        classifier=classifier.name,
        embedding=(classifier.input or (0,))[
            0 if isinstance(network.get_submodule(classifier.name), nn.Conv2d) else -1
        ],
        feature_map=feature.name,
        feature_shape=feature.output or (),
        layout=layout(feature.output or (), aspect),
        stages=tuple(replace(s, flops=s.flops // batch) for s in stages),
        cuts=_cuts(network, inner, classifier, root),
    )


def _example(network: nn.Module, example: Tensor | tuple[int, ...] | None) -> Tensor:
    if isinstance(example, Tensor):
        return example
    shape = example or getattr(network, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    first = next(network.parameters(), torch.zeros(()))
    return torch.randn(2, *shape, device=first.device, dtype=first.dtype)


def _classifier(network: nn.Module, calls: list[Call], num_classes: int) -> Call:
    """The last call of the classifier; NetworkError if there is none."""
    names = classifiers(network, calls, num_classes)
    if not names:
        advice = "okdc needs to know the classifier: end the network with one."
        if states_none(network):
            advice = "It was made without a classifier: network.reset_classifier(N) gives it one for N classes."
        raise NetworkError(
            f"{type(network).__name__} has no final Linear or 1x1 convolution with {num_classes} outputs. {advice}"
        )
    return [c for c in calls if c.name == names[0]][-1]


def _feature_map(network: nn.Module, calls: list[Call], classifier: Call, aspect: float) -> Call:
    """The outermost module whose output is the last map (or tokens) before pooling."""
    dense = [c.start for c in calls if _is_dense(network, c)]
    moment = min([*dense, classifier.start])
    before = [
        c
        for c in calls
        if c.end < moment and positions(c.output, aspect) and not (c.packed or c.kind.startswith("Drop"))
        if not any(pool.start < c.start and c.end < pool.end for pool in _pools_by_attention(calls, moment, aspect))
    ]
    spread = [c for c in before if (positions(c.output, aspect) or 0) > 1 and not c.kind.startswith("Adaptive")]
    ones = [c for c in calls if positions(c.outputs[0] if c.outputs else None, aspect) == 1 and c.chains]
    within = {c.start for c in before if any(o.start < c.start and c.end < o.end for o in ones)}
    spent = [c for c in spread if c.flops_end > c.flops_start and c.start not in within]
    since = spent[-1].end if spent else 0
    last = spread[-1] if spread else None
    if single := [c for c in before if c.end > since and _shrinks_to_one(c, aspect)]:
        # On small images the last stage is a single pixel: what enters the pooling after it is the feature map.
        # A block's shortcut may pool, too; what it pools is larger.
        outside = [c for c in before if c.start > single[0].end and c.start not in within]
        pools = [c.start for c in outside if "pool" in c.kind.lower() and positions(c.input, aspect) == 1]
        last = [c for c in before if c.end < min([*pools, moment])][-1]
    if last is None:
        raise NetworkError("the network has no feature map: no 4-D or token output before its classifier.")
    return widest(calls, last)


def _shrinks_to_one(call: Call, aspect: float) -> bool:
    """Whether this makes one pixel or token of several, by computing and not by pooling."""
    one = positions(call.output, aspect) == 1 < (positions(call.input, aspect) or 0)
    return one and call.flops_end > call.flops_start and "pool" not in call.kind.lower()


def _pools_by_attention(calls: list[Call], moment: int, aspect: float) -> list[Call]:
    """Modules of several layers that make a vector of a map or tokens, but for one that is most of the network."""
    half = max(c.flops_end for c in calls) / 2
    return [
        c
        for c in calls
        if not c.leaf and c.end < moment and len(c.output or ()) == 1 and (positions(c.input, aspect) or 0) > 1
        if c.flops_end - c.flops_start < half
    ]


def _is_dense(network: nn.Module, call: Call) -> bool:
    """Whether this is a linear layer written as a convolution: one kernel as large as the whole map (timm's VGG)."""
    layer = network.get_submodule(call.name)
    if not isinstance(layer, nn.Conv2d) or max(layer.stride) > 1 or call.input is None or len(call.input) != 3:
        return False
    return (
        call.input[1:] == tuple(layer.kernel_size) != (1, 1) and call.output is not None and call.output[1:] == (1, 1)
    )


def _cuts(network: nn.Module, calls: list[Call], classifier: Call, root: Call) -> tuple[Cut, ...]:
    """Every module that is called once and ends before the classifier, in the order of ending."""
    once = called_once(calls)
    total = max(1, root.flops_end)
    params = max(1, sum(p.numel() for p in network.parameters()))
    own = {name: sum(p.numel() for p in m.parameters(recurse=False)) for name, m in network.named_modules()}
    cuts, spent = [], 0
    for call in calls:
        spent += own[call.name] if call.name in once else 0
        if call.name in once and call.end < classifier.start:
            shape = () if call.packed else call.output or ()
            cuts.append(Cut(call.name, shape, 1 - call.flops_end / total, 1 - spent / params))
    return tuple(cuts)
