"""Branches narrower than the target: Torch-Pruning's dependency graph says which channels go together."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from okdc.anatomy import Anatomy
from okdc.cohort.depth import Chain
from okdc.errors import CutError, NetworkError, first_line


def narrow(
    network: nn.Module, anatomy: Anatomy, cut: str | None, trunk: Iterable[str], width: float, example: Tensor
) -> str:
    """Leave int(c * width) of the c channels of each layer behind the cut, at least one, and say so.

    Trunk and logits keep their widths, and so does a residual stream that comes out of the trunk, unless its first
    block takes a projection (He et al. 2015, option B). Groups, depthwise channels and attention heads stay whole.
    NetworkError without Torch-Pruning, or where it cannot follow the network; CutError if all is as wide as before.
    """
    pruning = _torch_pruning()
    place = f" after {cut!r}" if cut else ""
    if cut is not None:
        _project_shortcut(network, anatomy, cut)
    fixed = [m for name in (*trunk, anatomy.classifier) for m in network.get_submodule(name).modules()]
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    network.requires_grad_(True)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            # Where its search ends early, the forward below tells whether the widths fit.
            warnings.filterwarnings("ignore", "Maximum recursive depth", UserWarning)
            graph = pruning.DependencyGraph().build_dependency(network, (example,), verbose=False)
        owners = _attentions(network)
        groups = list(graph.get_all_groups(ignored_layers=fixed))
        narrowed = [_narrow_group(pruning, graph, group, owners, width) for group in groups]
        with torch.no_grad():
            network.eval()(example)
    except Exception as error:  # whatever the tracing, or a narrowed stranger's forward, raises
        ways = anatomy.ways_out(
            cut,
            "use a method whose branches are as wide as the target, such as ffl",
            how="Cut elsewhere with --cut NAME (behind the last change of resolution is the easiest):",
        )
        raise NetworkError(f"{anatomy.name} cannot be made narrower{place}: {first_line(error)}. {ways}") from error
    if not any(narrowed):
        raise CutError(
            f"nothing of {anatomy.name}{place} can be made narrower: every width comes from the trunk or is at "
            f"its least. {anatomy.ways_out(cut, 'have fewer --members', how='Cut earlier with --cut NAME, such as')}"
        )
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return f"width {width:.3g}"


def _torch_pruning() -> ModuleType:
    try:
        import torch_pruning
    except ImportError as error:
        raise NetworkError(
            "narrower branches need Torch-Pruning, which is not installed: pip install 'okdc[prune]'."
        ) from error
    return torch_pruning


def _project_shortcut(network: nn.Module, anatomy: Anatomy, cut: str) -> None:
    """Give the first block after the cut a projection, if it adds its unchanged input, which has the trunk's width."""
    moment = next(c.end for c in anatomy.calls if c.name == cut)
    after = sorted((c for c in anatomy.calls if c.start > moment), key=lambda c: c.start)
    for call in after:
        module = network.get_submodule(call.name)
        module = module.first if isinstance(module, Chain) else module
        if "downsample" in vars(module) or "downsample" in module._modules:  # as timm's and torchvision's ResNets
            if module.downsample is None and call.keeps_shape and call.input is not None and len(call.input) == 3:
                channels, weight = call.input[0], next(module.parameters())
                projection = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
                module.downsample = projection.to(weight.device, weight.dtype)
            return
        if isinstance(module, nn.Conv2d):
            return


def _attentions(network: nn.Module) -> dict[nn.Module, nn.Module]:
    """The layers that make queries, keys and values, each with its attention (all but torch's own, which is one)."""
    found: dict[nn.Module, nn.Module] = {}
    for module in network.modules():
        layers = [child for child in module.children() if isinstance(child, nn.Linear)]
        if isinstance(getattr(module, "num_heads", None), int) and not isinstance(module, nn.MultiheadAttention):
            found |= dict.fromkeys(layers[:-1], module)  # the last is the projection of what was attended to
    return found


def _narrow_group(
    pruning: ModuleType, graph: Any, group: Any, owners: dict[nn.Module, nn.Module], width: float
) -> bool:
    """Take the last channels from layers that must agree about them; whether there were any to take."""
    root, everything = group[0].dep.target.module, group[0].idxs
    if graph.get_out_channels(root) < len(everything):  # narrowed already, with another group
        return False
    for dependency, _ in group:
        if dependency.target.module in owners and graph.is_out_channel_pruning_fn(dependency.handler):
            return _narrow_heads(pruning, graph, owners[dependency.target.module], width)
    unit = math.lcm(*(_unit(dependency.target.module) for dependency, _ in group))
    kept = max(unit, _share(len(everything), width) // unit * unit)
    if kept >= len(everything):
        return False

    def tied(count: int) -> Any:
        """The last `count` channels with all that goes with them: some layers tie channels of their own together."""
        return graph.get_pruning_group(root, group[0].dep.handler, everything[len(everything) - count :])

    most = len(everything) - kept
    taken = tied(most)
    if len(taken[0].idxs) > most:
        count = bisect_right(range(1, most + 1), most, key=lambda n: len(tied(n)[0].idxs))
        if count == 0:
            return False
        taken = tied(count)
    taken.prune()
    return True


def _narrow_heads(pruning: ModuleType, graph: Any, attention: Any, width: float) -> bool:
    """Take whole heads, the last ones; not where weights of other kinds (position biases, norms) count heads."""
    layers = [child for child in attention.children() if isinstance(child, nn.Linear)]
    counted = sum(p.numel() for layer in layers for p in layer.parameters())
    heads, inner = attention.num_heads, layers[-1].in_features
    kept = max(1, _share(heads, width))
    if kept == heads or inner % heads or counted != sum(p.numel() for p in attention.parameters()):
        return False
    dropped = list(range(kept * inner // heads, inner))
    graph.get_pruning_group(layers[-1], pruning.prune_linear_in_channels, dropped).prune()
    attention.num_heads = kept
    if hasattr(attention, "attn_dim"):
        attention.attn_dim = layers[-1].in_features
    return True


def _unit(layer: object) -> int:
    """How many channels of this layer can only be taken together."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return 1 if layer.groups == layer.out_channels else layer.groups
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    return layer.num_heads if isinstance(layer, nn.MultiheadAttention) else 1


def _share(count: int, width: float) -> int:
    return int(count * width + 1e-6)  # truncated as exact fractions are: 0.6 of 5 is 3, whatever floats say
