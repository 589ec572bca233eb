"""What a network is made of: its stages, blocks, cuts, classifier and feature map, learned by running it once."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from okdc.calls import Call, called_once, layout, positions, same_size, watch
from okdc.errors import NetworkError, nearest

ISOTROPIC = 0.72  # networks whose last stage is a larger share of the FLOPs part between its blocks
MIN_TAIL = 0.05  # a default cut leaves at least this share of the FLOPs to each branch


@dataclass(frozen=True)
class Stage:
    """A run of equal spatial size: `size` is pixels or tokens, `blocks` the modules that may be repeated at its end."""

    size: int
    first: str  # the first outermost module of the stage
    before: str | None  # the module after which the stage starts, i.e. the cut that gives it to every branch
    last: str  # the outermost module that the stage ends with
    blocks: tuple[tuple[str, ...], ...]  # names; a block of a plain Sequential is several neighbours (conv, bn, act)
    flops: int
    end: int


@dataclass(frozen=True)
class Cut:
    """A place to part: `name` is the module after which branches begin."""

    name: str
    shape: tuple[int, ...]
    flops_after: float  # share of the target's FLOPs (0 to 1)
    params_after: float


@dataclass(frozen=True)
class Anatomy:
    """What `inspect` found out about a network."""

    name: str
    input_size: tuple[int, ...]
    num_classes: int
    params: int
    flops: int  # multiply-adds count as two
    classifier: str
    embedding: int  # width of the classifier's input
    feature_map: str  # the module whose output is the last map, or the last tokens, before pooling
    feature_shape: tuple[int, ...]
    layout: str  # nchw, nhwc or tokens
    stages: tuple[Stage, ...]
    cuts: tuple[Cut, ...]
    calls: tuple[Call, ...]

    def cut(self, private_stages: int = 1) -> str:
        """The cut that gives the last `private_stages` stages to every branch.

        Networks whose last stage is most of the network (a ViT) part after two thirds of its blocks instead.
        """
        last = self.stages[-1]
        if last.before is None or last.flops > ISOTROPIC * self.flops:
            return self._cut_between_blocks()
        candidates = [s.before for s in self.stages[-private_stages:] if s.before] + [
            s.before for s in reversed(self.stages[:-private_stages]) if s.before
        ]
        legal = {c.name for c in self._legal()}
        for name in candidates:
            if name in legal:
                return name
        return self._cut_by_cost()

    def find_cut(self, name: str) -> Cut:
        """The cut called `name`; NetworkError with the nearest names when there is none."""
        for cut in self.cuts:
            if cut.name == name:
                return cut
        known = [c.name for c in self.cuts]
        hint = nearest(name, known) or f" For example {', '.join(known[-6:])}."
        raise NetworkError(f"{self.name} cannot be cut after {name!r}.{hint} (okdc inspect lists every cut.)")

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
        blocks = self.stages[-1].blocks
        return blocks[max(0, math.ceil(2 * len(blocks) / 3) - 1)][-1] if len(blocks) > 2 else self._cut_by_cost()

    def _cut_by_cost(self) -> str:
        """The cut whose tail is nearest to a third of the FLOPs, outermost modules first."""
        legal = self._legal()
        if not legal:
            raise NetworkError(
                f"{self.name} has no module to part after: nothing follows that is worth training. "
                "Train whole peer networks instead: --share none."
            )
        near = [c for c in legal if abs(c.flops_after - 1 / 3) < 0.15]
        least = min(c.name.count(".") for c in near or legal)
        outer = [c for c in near or legal if c.name.count(".") == least]
        return min(outer, key=lambda c: abs(c.flops_after - 1 / 3)).name


def inspect(network: nn.Module, example: Tensor | tuple[int, ...] | None = None) -> Anatomy:
    """Run `network` once on `example` (B, C, H, W), or on noise of that (C, H, W) shape, and describe what it did.

    The network is left as it was: weights, buffers, mode. NetworkError if it does not give one (B, classes) tensor.
    """
    images = _example(network, example)
    calls, logits = watch(network, images)
    if not (isinstance(logits, Tensor) and logits.dim() == 2):
        raise NetworkError(
            f"{type(network).__name__} returned {_describe(logits)} for images {tuple(images.shape)}; "
            "expected one tensor of logits (batch, classes). Wrap it in a module that returns the logits alone."
        )
    root = calls[-1]
    inner = [c for c in calls[:-1] if c.start > root.start]
    classifier = _classifier(network, inner, logits.shape[1])
    aspect = images.shape[-2] / images.shape[-1]
    feature = _feature_map(network, inner, classifier, aspect)
    stages = _stages(network, inner, feature, classifier, aspect)
    return Anatomy(
        name=type(network).__name__,
        input_size=tuple(images.shape[1:]),
        num_classes=logits.shape[1],
        params=sum(p.numel() for p in network.parameters()),
        flops=root.flops_end // images.shape[0],
        classifier=classifier.name,
        embedding=(classifier.input or (0,))[0],
        feature_map=feature.name,
        feature_shape=feature.output or (),
        layout=layout(feature.output or (), aspect),
        stages=tuple(replace(s, flops=s.flops // images.shape[0]) for s in stages),
        cuts=_cuts(network, inner, classifier, root),
        calls=tuple(inner),
    )


def _example(network: nn.Module, example: Tensor | tuple[int, ...] | None) -> Tensor:
    if isinstance(example, Tensor):
        return example
    shape = example or getattr(network, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    first = next(network.parameters(), torch.zeros(()))
    return torch.randn(2, *shape, device=first.device, dtype=first.dtype)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _classifier(network: nn.Module, calls: list[Call], num_classes: int) -> Call:
    """The last Linear or 1x1 convolution that gives `num_classes`; timm's `get_classifier()` where there is one."""
    modules = dict(network.named_modules())
    getter = getattr(network, "get_classifier", None)
    own = getter() if callable(getter) else None
    if isinstance(own, (tuple, list)):  # a distilled head: the class token's classifier comes first
        own = own[0]
    if isinstance(own, nn.ModuleList):  # a classifier for each of several depths: the deepest comes last
        own = own[-1]
    parts = set(own.modules()) if isinstance(own, nn.Module) else set()
    candidates = [
        c
        for c in calls
        if c.output is not None and c.output[0] == num_classes and isinstance(modules[c.name], (nn.Linear, nn.Conv2d))
    ]
    named = [c for c in candidates if modules[c.name] in parts]
    if not (named or candidates):
        raise NetworkError(
            f"{type(network).__name__} has no final Linear or 1x1 convolution with {num_classes} outputs. "
            "okdc needs to know the classifier: end the network with one."
        )
    return (named or candidates)[-1]


def _feature_map(network: nn.Module, calls: list[Call], classifier: Call, aspect: float) -> Call:
    """The outermost module whose output is the last map (or tokens) before pooling."""
    dense = [c.start for c in calls if _is_dense(network, c)]
    moment = min([*dense, classifier.start])
    before = [
        c
        for c in calls
        if c.end < moment and positions(c.output, aspect) and not (c.packed or c.kind.startswith("Drop"))
    ]
    spread = [c for c in before if (positions(c.output, aspect) or 0) > 1 and not c.kind.startswith("Adaptive")]
    pools = [c for c in before if "pool" in c.kind.lower() and positions(c.input, aspect) == 1]
    smallest = min((positions(c.output, aspect) or 0 for c in spread), default=1)
    if pools and smallest <= 4 and not any(c.start > pools[-1].start for c in spread):
        # On small images the last stage is a single pixel: what enters the last pooling is the feature map.
        before = [c for c in before if c.end < pools[-1].start]
        last = before[-1] if before else None
    else:
        last = spread[-1] if spread else None
    if last is None:
        raise NetworkError("the network has no feature map: no 4-D or token output before its classifier.")
    return _outermost(calls, last)


def _is_dense(network: nn.Module, call: Call) -> bool:
    """Whether this is a linear layer written as a convolution: one kernel as large as the whole map (timm's VGG)."""
    layer = network.get_submodule(call.name)
    if not isinstance(layer, nn.Conv2d) or call.input is None or len(call.input) != 3:
        return False
    return (
        call.input[1:] == tuple(layer.kernel_size) != (1, 1) and call.output is not None and call.output[1:] == (1, 1)
    )


def _outermost(calls: list[Call], call: Call) -> Call:
    """The largest module that ends with the same output, with nothing else called in between."""
    best, clock = call, call.end
    for other in calls:
        if other.end == clock + 1 and other.start <= best.start and other.output == call.output:
            best, clock = other, other.end
    return best


def _stages(network: nn.Module, calls: list[Call], feature: Call, classifier: Call, aspect: float) -> list[Stage]:
    """Runs of equal size, early to late; leading ones without a block (the stem) are left out when others have one."""
    body = [c for c in calls if c.end < classifier.start]
    path = _main_path(network, body, aspect)
    starts = {s: _stage_start(path, s, aspect) for s in _sizes(path, feature, aspect)}
    order = [(c, s) for s, c in sorted(starts.items(), key=lambda item: -item[0]) if c is not None]
    stages: list[Stage] = []
    for i, (begin, size) in enumerate(order):
        first = _widened(body, begin, size, aspect)
        later = [c.start for c, _ in order[i + 1 :]]
        limit = min(later) if later else feature.end + 1
        inside = [c for c in body if c.start >= first.start and c.end < limit]
        if not inside or inside[-1].flops_end == first.flops_start:
            continue
        ends = [c for c in inside if same_size(positions(c.output, aspect), size)]
        last = _outermost(inside, ends[-1]) if ends else inside[-1]
        stages.append(
            Stage(
                size=size,
                first=first.name,
                before=_ended_before(body, first),
                last=last.name,
                blocks=_blocks(network, inside, size, aspect),
                flops=inside[-1].flops_end - first.flops_start,
                end=inside[-1].end,
            )
        )
    if not stages:
        raise NetworkError(f"{type(network).__name__} has no stages that okdc can see.")
    worth = [s for s in stages if s.blocks] or [s for s in stages if _compound(network, body, s, aspect)] or stages[-1:]
    return [s for s in stages if s.size <= worth[0].size]


def _compound(network: nn.Module, body: list[Call], stage: Stage, aspect: float) -> bool:
    """Whether a stage has a module of several layers that works at its size (though it does not keep its shape)."""
    start = next(c.start for c in body if c.name == stage.first)
    inside = [c for c in body if c.start >= start and c.end <= stage.end and not c.leaf and not is_part(c)]
    sized = [c for c in inside if same_size(positions(c.output, aspect), stage.size) and c.flops_end > c.flops_start]
    return any(not isinstance(network.get_submodule(c.name), nn.Sequential) for c in sized)


def _main_path(network: nn.Module, calls: list[Call], aspect: float) -> list[Call]:
    """The calls that data passes one after the other, none inside another, early to late.

    Those that make the map smaller more than once, or return no map, and plain sequences are seen as their parts; what
    happens inside a block (keys pooled for attention, side branches) is not seen.
    """

    def is_whole(call: Call) -> bool:
        before, after = positions(call.input, aspect) or 0, positions(call.output, aspect)
        return after is not None and before < 6 * after and not isinstance(modules[call.name], nn.Sequential)

    modules = dict(network.named_modules())
    path: list[Call] = []
    reached = 0
    for call in sorted(calls, key=lambda c: c.start):
        if call.start > reached and (call.leaf or is_whole(call)):
            path.append(call)
            reached = call.end
    return path


def _sizes(body: list[Call], feature: Call, aspect: float) -> list[int]:
    """The sizes that stages have, large to small; of those that differ by a class token, the most frequent."""
    count = Counter(s for c in body if c.end <= feature.end and (s := positions(c.output, aspect)))
    smallest = positions(feature.output, aspect) or 1
    sizes: list[int] = []
    for size, _ in count.most_common():
        if not any(same_size(size, other) for other in sizes) and (size >= smallest or same_size(size, smallest)):
            sizes.append(size)
    return sorted(sizes, reverse=True)


def _stage_start(body: list[Call], size: int, aspect: float) -> Call | None:
    """The first module that takes the size before and gives `size`; a mere pooling belongs to the stage before it."""

    def gives(call: Call) -> bool:
        return same_size(positions(call.output, aspect), size)

    def enters(call: Call) -> bool:
        before = positions(call.input, aspect) or math.inf
        return call.input is not None and gives(call) and before >= 1.5 * size

    entering = [c for c in body if enters(c)]
    if not entering:
        return min((c for c in body if gives(c)), key=lambda c: c.start, default=None)
    nearest_size = min(positions(c.input, aspect) or 0 for c in entering)
    first = min((c for c in entering if (positions(c.input, aspect) or 0) == nearest_size), key=lambda c: c.start)
    if first.flops_end == first.flops_start:
        following = [c for c in body if c.start > first.end and gives(c)]
        if following:
            return min(following, key=lambda c: c.start)
    return first


def _widened(body: list[Call], first: Call, size: int, aspect: float) -> Call:
    """The largest module that begins with this call and gives the same size: a stage rather than its first block."""
    for other in sorted((c for c in body if c.start < first.start and c.end > first.end), key=lambda c: -c.start):
        if other.start != first.start - 1 or not same_size(positions(other.output, aspect), size):
            break
        first = other
    return first


def _ended_before(body: list[Call], first: Call) -> str | None:
    """The outermost module that ended last before `first` began."""
    once = called_once(body)
    done = [c for c in body if c.end < first.start and c.name in once]
    return _outermost(done, done[-1]).name if done else None


def _blocks(network: nn.Module, inside: list[Call], size: int, aspect: float) -> tuple[tuple[str, ...], ...]:
    """Modules that keep their input's shape and may be repeated: residual and transformer blocks, conv-bn-act runs."""
    modules = dict(network.named_modules())
    once = called_once(inside)
    same = outermost(
        [
            c
            for c in inside
            if c.keeps_shape
            and not c.leaf
            and c.name in once
            and same_size(positions(c.output, aspect), size)
            and any(True for _ in modules[c.name].parameters())
            and not isinstance(modules[c.name], nn.Sequential)
            and not is_part(c)
            and not _spans_blocks(c, inside, size, aspect)
        ]
    )
    spent = {c.name: c.flops_end - c.flops_start for c in same}
    worthy = [c for c in same if spent[c.name] >= 0.5 * max(spent.values())]
    if sum(spent[c.name] for c in worthy) >= 0.05 * (inside[-1].flops_end - inside[0].flops_start) > 0:
        return tuple((c.name,) for c in worthy)
    return tuple(_runs(modules, inside, size, aspect))


def outermost(calls: list[Call]) -> list[Call]:
    """Those of the calls that no other of them encloses."""
    return [c for c in calls if not any(o.start < c.start and c.end < o.end for o in calls)]


def _spans_blocks(call: Call, inside: list[Call], size: int, aspect: float) -> bool:
    """Whether this is a container of several shape-keeping blocks of one kind (a stage) rather than a block."""
    within = [c for c in inside if call.start < c.start and c.end < call.end and c.keeps_shape and not c.leaf]
    spent: dict[str, list[int]] = {}
    within = [c for c in within if c.kind != "Sequential" and not is_part(c)]
    for c in outermost([c for c in within if same_size(positions(c.output, aspect), size)]):
        spent.setdefault(c.kind, []).append(c.flops_end - c.flops_start)
    return any(len(each) > 1 and 2 * sum(each) > call.flops_end - call.flops_start for each in spent.values())


def is_part(call: Call) -> bool:
    """Whether this is, by its kind's name, a part of blocks (a norm, an attention, an MLP) and no block."""
    return re.search(_PARTS, call.kind) is not None


_PARTS = (
    r"(Mlp|MLP|Ffn|FFN|Attn|Attention|Norm\d?d?|Act|Act2d|Activation|SE|SEModule|SqueezeExcite|LayerScale|Drop\w*|\w*PosEnc|"
    r"\w*SeparableConv2d|^Separable\w*|BranchSeparables|BnActConv2d|ActConvBn|ConvBn)$"
)


def _runs(modules: dict[str, nn.Module], inside: list[Call], size: int, aspect: float) -> Iterator[tuple[str, ...]]:
    """Shape-keeping runs convolution .. next convolution of a flat Sequential (VGG's conv-bn-relu)."""
    flat = [c for c in inside if c.leaf and c.keeps_positions(aspect) and same_size(positions(c.output, aspect), size)]
    once = called_once(inside)  # an activation that several layers share cannot be appended to
    for i, call in enumerate(flat):
        layer = modules[call.name]
        if not (isinstance(layer, nn.Conv2d) and call.keeps_shape and layer.groups == 1):
            continue
        parent = call.name.rpartition(".")[0]
        run = [call.name]
        for follower in flat[i + 1 :]:
            beyond = isinstance(modules[follower.name], nn.Conv2d) or follower.name not in once
            if beyond or follower.name.rpartition(".")[0] != parent:
                break
            run.append(follower.name)
        if isinstance(modules.get(parent), nn.Sequential):
            yield tuple(run)


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
