"""What okdc can do with one network, found by doing it: cut, share, grow, train, strip; if asked, compile, export."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from okdc import networks
from okdc.anatomy import Anatomy, inspect
from okdc.anatomy.modes import unchanged
from okdc.cohort import Branch, Cohort
from okdc.cohort.depth import FALLBACKS
from okdc.cohort.replay import Replay
from okdc.deploy import targets
from okdc.errors import CutError, OkdcError, first_line
from okdc.recipe import NetworkSettings
from okdc.system.waiting import Alarm

COLUMNS = (
    "network", "family", "outcome", "img_size", "input", "params_m", "gflops", "stages", "cut", "cut_shape",
    "tail_flops", "tail_params", "shared", "grown", "own_blocks", "narrowed", "trains", "classifier", "embedding",
    "feature_map", "feature_shape", "strip", "compile_breaks", "onnx_difference", "seconds", "reason", "versions",
)  # fmt: skip

WIDTH = 0.5  # of the narrower branch that is tried
NARROWING_SECONDS = 20  # Torch-Pruning follows some networks (nest) for minutes
COPIES = 3  # of the weights at least: the target, the copy that proves the cut, a branch
CLASSES = 10  # networks get a new classifier, as with data; some of timm's are made without one
VERSIONS = f"timm {timm.__version__}, torch {torch.__version__.partition('+')[0]}, python {platform.python_version()}"


def examine(name: str, *, img_size: int | None = None, compiles: bool = False, onnx: bool = False) -> dict[str, Any]:
    """One row of `COLUMNS` about the network `name`, newly made; its own input size where it does not take `img_size`.

    `outcome` is ok, partly (`reason` says what is missing) or refused (`reason` is the error).
    """
    started = time.perf_counter()
    row: dict[str, Any] = {"network": name, "family": family(name), "versions": VERSIONS}
    torch.manual_seed(0)
    try:
        network, shape = _build(name, img_size)
        row |= {"input": "x".join(map(str, shape)), "params_m": _millions(sum(p.numel() for p in network.parameters()))}
        images = torch.randn(2, *shape)
        anatomy = inspect(network, images)
        _fill(network.get_submodule(anatomy.classifier))
        row |= _describe(anatomy)
        row |= _share_and_grow(network, images, anatomy)
        if row["shared"] == "exact":
            with _limited(NARROWING_SECONDS):
                narrowed = _attempt(lambda: _narrowed(network, images, anatomy))
            row["narrowed"] = narrowed.partition(". Cut elsewhere")[0]
        if compiles:
            row["compile_breaks"] = _attempt(lambda: _compile_breaks(network, images, anatomy))
        if onnx:
            row["onnx_difference"] = _attempt(lambda: _onnx_difference(network, images))
        row["outcome"] = "partly" if row["reason"] else "ok"
    except Exception as error:  # whatever a stranger's code raises is what the table is about
        kind = "" if isinstance(error, OkdcError) else f"{type(error).__name__}: "
        row |= {"outcome": "refused" if isinstance(error, OkdcError) else "failed", "reason": kind + _line(error)}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def least_gigabytes(name: str) -> float:
    """The memory that `COPIES` of a network's weights take, at the least; 0 where that cannot be told beforehand."""
    try:
        with torch.device("meta"):
            plain = name.removeprefix("torchvision/")
            network = (timm.create_model if plain == name else torchvision.models.get_model)(plain)
    except Exception:  # it looks at its weights while it is made
        return 0.0
    return COPIES * sum(p.numel() for p in network.parameters()) * 4 / 1e9


def family(name: str) -> str:
    """timm's module of a network, or torchvision; nothing for a name that is unknown."""
    if name.startswith("torchvision/"):
        return "torchvision"
    known = timm.is_model(name.partition(".")[0])
    return timm.models.model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2] if known else ""


def _build(name: str, img_size: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network and the input shape that it takes."""
    for settings in [NetworkSettings(model=name, img_size=img_size), NetworkSettings(model=name)][not img_size :]:
        try:
            network = networks.load(settings, CLASSES)
            shape = networks.data_config(network, settings)["input_size"]
            networks.check_input(network, shape)
            return network, shape
        except OkdcError as error:
            reason = error
    raise reason


@torch.no_grad()
def _fill(classifier: nn.Module) -> None:
    """timm makes some classifiers zero, and then whatever is before them gives the same logits."""
    for parameter in classifier.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def _describe(anatomy: Anatomy) -> dict[str, Any]:
    cut = anatomy.find_cut(anatomy.cut())
    return {
        "gflops": round(anatomy.flops / 1e9, 3),
        "stages": " ".join(f"{s.size}:{len(s.blocks)}" for s in anatomy.stages),
        "cut": cut.name,
        "cut_shape": "x".join(map(str, cut.shape)),
        "tail_flops": round(cut.flops_after, 3),
        "tail_params": round(cut.params_after, 3),
        "classifier": anatomy.classifier,
        "embedding": anatomy.embedding,
        "feature_map": anatomy.feature_map,
        "feature_shape": "x".join(map(str, anatomy.feature_shape)),
    }


def _share_and_grow(network: nn.Module, images: Tensor, anatomy: Anatomy) -> dict[str, Any]:
    """Attach a branch that is a block deeper in each stage, make a training step's gradients, strip."""
    cut = anatomy.cut()
    deeper = (1,) * len(anatomy.stages_after(cut))
    before, keys = _logits(network, images), list(network.state_dict())
    row: dict[str, Any] = {"shared": "exact", "reason": ""}
    taps = ("feature_maps", "embeddings")
    try:
        cohort = Cohort(network, images, [Branch(cut, deeper)], taps=taps, anatomy=anatomy)
    except OkdcError as error:
        return row | {"shared": "" if isinstance(error, CutError) else "exact", "reason": _line(error)}
    except Exception as error:  # a branch that cannot be grown; that it is shared is shown by itself
        cohort = Cohort(network, images, [Branch(cut)], taps=taps, anatomy=anatomy)
        row["reason"] = f"growth: {type(error).__name__}: {_line(error)}"
    else:
        fallback = any(isinstance(m, FALLBACKS) for m in cohort.branches.modules())
        row |= {"grown": cohort.grown[0], "own_blocks": "no" if fallback else "yes"}
        row["reason"] = "" if row["grown"] else "growth: no stage after the default cut"
    row["trains"] = _attempt(lambda: _gradients(cohort, images))
    stripped = cohort.strip() is network and list(network.state_dict()) == keys and _is_clean(network)
    row["strip"] = "exact" if stripped and torch.equal(_logits(network, images), before) else "no"
    if not row["reason"] and (row["trains"] != "yes" or row["strip"] != "exact"):
        row["reason"] = "training: " + row["trains"] if row["trains"] != "yes" else "strip"
    return row


def _narrowed(network: nn.Module, images: Tensor, anatomy: Anatomy) -> str:
    """Whether a branch of `WIDTH` can be built, runs, and is smaller than the target's own tail."""
    cut = anatomy.cut()
    cohort = Cohort(network, images, [Branch(cut, width=WIDTH)], anatomy=anatomy)
    try:
        own, narrower = (cost.flops for cost in cohort.costs)
        with torch.no_grad():
            cohort.eval()(images)
    finally:
        cohort.strip()
    tail = own * anatomy.find_cut(cut).flops_after
    return "yes" if narrower < tail else f"no: {narrower / tail:.0%} of the FLOPs of the target's tail"


def _gradients(cohort: Cohort, images: Tensor) -> str:
    """Whether a backward pass in training mode gives a gradient to all that the target alone has one for."""
    with unchanged(cohort):
        cohort.train()
        sum(z.square().sum() for z in cohort(images).logits).backward()
    missing = [n for n, p in cohort.branches.named_parameters() if p.requires_grad and p.grad is None]
    own = {n for n, p in cohort.target.named_parameters() if p.grad is not None}
    cohort.zero_grad()
    lost = [n for n in missing if n.partition(".")[2] in own]
    return f"no gradient for {lost[0]} and {len(lost) - 1} more" if lost else "yes"


def _compile_breaks(network: nn.Module, images: Tensor, anatomy: Anatomy) -> int:
    cohort = Cohort(network, images, [Branch(anatomy.cut())], anatomy=anatomy)
    try:
        with torch.no_grad():
            return torch._dynamo.explain(cohort.eval())(images).graph_break_count
    finally:
        cohort.strip()


def _onnx_difference(network: nn.Module, images: Tensor) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return targets.find("onnx").module.write(network, images, Path(folder) / "model.onnx")["rel_error"]


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer, where the system can (not on Windows, not outside the main thread)."""
    with Alarm(TimeoutError(f"not done after {seconds:g} seconds")) as alarm:
        alarm.set(seconds)
        yield


def _attempt(check: Callable[[], Any]) -> Any:
    try:
        return check()
    except OkdcError as error:
        return _line(error)
    except Exception as error:
        return f"{type(error).__name__}: {_line(error)}"


@torch.no_grad()
def _logits(network: nn.Module, images: Tensor) -> Tensor:
    return network.eval()(images)


def _is_clean(network: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks or isinstance(m, Replay) for m in network.modules())


def _line(error: Exception) -> str:
    return first_line(error)[:300]


def _millions(count: int) -> float:
    return round(count / 1e6, 3)
