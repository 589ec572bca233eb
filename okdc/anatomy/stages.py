"""The stages of a network, found on the way that data takes through it, and the blocks in them that can be repeated."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from okdc.anatomy.calls import Call, called_once
from okdc.anatomy.shapes import positions, same_size
from okdc.errors import NetworkError


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
    plain: bool = False  # its blocks are mere convolutions with norm and activation, as a VGG's


def find_stages(network: nn.Module, calls: list[Call], feature: Call, classifier: Call, aspect: float) -> list[Stage]:
    """Runs of equal size, early to late, without those of the stem."""
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
        last = widest(inside, ends[-1]) if ends else inside[-1]
        blocks = _blocks(network, inside, size, aspect)
        units = () if blocks else _units(network, inside, size, aspect)
        stages.append(
            Stage(
                size=size,
                first=first.name,
                before=_ended_before(body, first),
                last=last.name,
                blocks=blocks or units,
                flops=inside[-1].flops_end - first.flops_start,
                end=inside[-1].end,
                plain=bool(units),
            )
        )
    if not stages:
        raise NetworkError(f"{type(network).__name__} has no stages that okdc can see.")
    return _without_stem(network, body, stages, aspect)


def _without_stem(network: nn.Module, body: list[Call], stages: list[Stage], aspect: float) -> list[Stage]:
    """Leave out leading stages without a block when others have one, and plain ones before the bulk of the network."""
    made = [s for s in stages if s.blocks and not s.plain]
    bulk = sum(s.flops for s in stages if made and s.size <= made[0].size)
    worth = made if 2 * bulk > sum(s.flops for s in stages) else [s for s in stages if s.blocks]
    worth = worth or [s for s in stages if _compound(network, body, s, aspect)] or stages[-1:]
    return [s for s in stages if s.size <= worth[0].size]


def _compound(network: nn.Module, body: list[Call], stage: Stage, aspect: float) -> bool:
    """Whether a stage has a module of several layers that works at its size (though it does not keep its shape)."""
    start = next(c.start for c in body if c.name == stage.first)
    inside = [c for c in body if c.start >= start and c.end <= stage.end and not c.leaf and not is_part(c)]
    sized = [c for c in inside if any(same_size(positions(o, aspect), stage.size) for o in c.outputs)]
    return any(c.flops_end > c.flops_start and not is_sequence(network.get_submodule(c.name)) for c in sized)


def _main_path(network: nn.Module, calls: list[Call], aspect: float) -> list[Call]:
    """The calls that data passes one after the other, none inside another, early to late.

    Those that make the map smaller more than once, or return no map, and plain sequences are seen as their parts; what
    happens inside a block (keys pooled for attention, side branches) is not seen.
    """

    def is_whole(call: Call) -> bool:
        before = positions(call.input, aspect) or 0
        after = positions(call.outputs[0] if call.repeats else call.output, aspect)
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
    if body_sizes := [s for c in body if not c.leaf and c.end <= feature.end and (s := positions(c.output, aspect))]:
        smallest = min(smallest, *body_sizes)  # of a network that ends by enlarging its maps
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
    return widest(done, done[-1]).name if done else None


def _blocks(network: nn.Module, inside: list[Call], size: int, aspect: float) -> tuple[tuple[str, ...], ...]:
    """Modules that keep their input's shape and may be repeated: residual and transformer blocks.

    Those that work at the stage's size come first; then any that make up most of the stage (blocks of two streams, or
    of windows that are an axis of their own).
    """
    modules, once = dict(network.named_modules()), called_once(inside)
    keeping = [
        c
        for c in inside
        if c.chains
        and not c.leaf
        and c.name in once
        and any(True for _ in modules[c.name].parameters())
        and (not isinstance(modules[c.name], nn.Sequential) or _is_written_out(modules, c.name))
        and not is_part(c)
    ]
    sized = [c for c in keeping if same_size(positions(c.output, aspect), size)]
    total = inside[-1].flops_end - inside[0].flops_start
    for candidates, least in ((sized, 0.05), (keeping, 0.5)):
        same = outermost([c for c in candidates if not _spans_blocks(modules, c, candidates)])
        # What is inside the stage's first block, which does not keep its shape as others of its kind do, is a part.
        kinds = {c.kind for c in same if not isinstance(modules[c.name], nn.Sequential)}
        same = [c for c in same if not any(_is_inside(c, o) for o in inside if o.kind in kinds)]
        spent = {c.name: c.flops_end - c.flops_start for c in same}
        worthy = [c for c in same if spent[c.name] >= 0.5 * max(spent.values())]
        if sum(spent[c.name] for c in worthy) >= least * total > 0:
            return tuple((c.name,) for c in worthy)
    return ()


def _units(network: nn.Module, inside: list[Call], size: int, aspect: float) -> tuple[tuple[str, ...], ...]:
    """The runs that keep their input's shape, of a stage that has no other block."""
    modules = dict(network.named_modules())
    return tuple(run for run in runs(modules, inside, size, aspect) if not _enclosed(modules, inside, run))


def outermost(calls: list[Call]) -> list[Call]:
    """Those of the calls that no other of them encloses."""
    return [c for c in calls if not any(_is_inside(c, o) for o in calls)]


def _is_inside(call: Call, other: Call) -> bool:
    return other.start < call.start and call.end < other.end


def _spans_blocks(modules: dict[str, nn.Module], call: Call, blocks: list[Call]) -> bool:
    """Whether this is a container of these shape-keeping blocks, most of them made alike (a stage), and no block."""
    spent: dict[tuple[str, ...], list[int]] = {}
    for c in outermost([c for c in blocks if _is_inside(c, call)]):
        spent.setdefault(_makeup(modules[c.name]), []).append(c.flops_end - c.flops_start)
    repeated = sum(sum(each) for each in spent.values() if len(each) > 1)
    return 2 * repeated > call.flops_end - call.flops_start


def _makeup(module: nn.Module) -> tuple[str, ...]:
    """The kinds of all that a module is made of, but for what only some of a stage's blocks have."""
    parts = [c for c in module.children() if not re.search(_OPTIONAL, type(c).__name__)]
    return (type(module).__name__, *(kind for part in parts for kind in _makeup(part)))


def _is_written_out(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether this is a block written as a plain Sequential: different parts, repeated as a whole (ConvMixer's)."""
    parts = [_makeup(m) for m in modules[name].children() if any(True for _ in m.parameters())]
    if len(set(parts)) != len(parts) or not is_sequence(modules[name.rpartition(".")[0]]):
        return False
    makeup = _makeup(modules[name])
    return len(parts) > 1 < sum(_makeup(m) == makeup for m in modules.values() if isinstance(m, nn.Sequential))


def is_sequence(module: nn.Module) -> bool:
    """Whether this only calls its parts one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def is_part(call: Call) -> bool:
    """Whether this is, by its kind's name, a part of blocks (a norm, an attention, an MLP) and no block."""
    return re.search(_PARTS, call.kind) is not None


_OPTIONAL = r"^(Drop|Identity|SqueezeExcit|\w*SE(Module)?$)"  # what blocks of a stage may differ in
_PARTS = (  # what timm, torchvision and most others call them; a wrong guess costs a choice of block, never exactness
    r"(Mlp|MLP|Ffn|FFN|Attn|(?<!Mobile)Attention|Attention2d|Norm\d?d?|Act|Act2d|Activation|(?<![A-Z])SE|SEModule|SqueezeExcite|"
    r"LayerScale|Drop\w*|\w*PosEnc|\w*SeparableConv2d|^Separable\w*|BranchSeparables|BnActConv2d|ActConvBn|ConvBn)$"
)


def runs(
    modules: dict[str, nn.Module], inside: list[Call], size: int, aspect: float, keeping: bool = True
) -> Iterator[tuple[str, ...]]:
    """Runs convolution .. next convolution of a Sequential (VGG's conv-bn-relu); `keeping` their input's shape.

    A module that is made of one convolution, norm and activation is as good as the three in the Sequential itself.
    """
    steps = outermost([c for c in inside if c.leaf or _is_unit(modules, c.name)])
    flat = [c for c in steps if same_size(positions(c.output, aspect), size)]
    once = called_once(inside)  # an activation that several layers share cannot be appended to
    for i, call in enumerate(flat):
        layer = _convolution(modules[call.name])
        if layer is None or layer.groups > 1 or not (call.keeps_shape or not keeping):
            continue
        parent = call.name.rpartition(".")[0]
        run = [call.name]
        for follower in flat[i + 1 :]:
            beyond = _convolution(modules[follower.name]) is not None or follower.name not in once
            beyond = beyond or not follower.keeps_positions(aspect)
            if beyond or follower.name.rpartition(".")[0] != parent:
                break
            run.append(follower.name)
        if isinstance(modules.get(parent), nn.Sequential):
            yield tuple(run)


def _is_unit(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether this is a step of a Sequential that has one convolution, and is no Sequential itself."""
    steps, module = modules.get(name.rpartition(".")[0]), modules[name]
    flat = isinstance(steps, nn.Sequential) and not isinstance(module, nn.Sequential)
    return flat and _convolution(module) is not None


def _convolution(module: nn.Module) -> nn.Conv2d | None:
    """The convolution that this is, or that is the one layer in it beside norms and activations."""
    layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Conv2d) else None


def _enclosed(modules: dict[str, nn.Module], inside: list[Call], run: tuple[str, ...]) -> bool:
    """Whether a run is inside a module of the stage that has a forward of its own: it is a part of that block."""
    return any(run[0].startswith(f"{c.name}.") and not is_sequence(modules[c.name]) for c in inside)


def widest(calls: list[Call], call: Call) -> Call:
    """The largest module that ends with the same output, with nothing else called in between."""
    best, clock = call, call.end
    for other in calls:
        if other.end == clock + 1 and other.start <= best.start and other.output == call.output:
            best, clock = other, other.end
    return best
