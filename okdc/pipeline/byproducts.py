"""What a training gives beside the student: further networks, each exported and verified in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from okdc import deploy
from okdc.anatomy.modes import at_rest
from okdc.data import Data
from okdc.errors import OkdcError
from okdc.methods import Method
from okdc.ranks import rank
from okdc.recipe import ExportSettings
from okdc.tasks.task import Task
from okdc.training import checkpoint

if TYPE_CHECKING:
    from okdc.verification.schema import Verification

FOLDER = "byproducts"


def take(
    method: Method, folder: Path, settle: Callable[[nn.Module], nn.Module]
) -> tuple[dict[str, nn.Module], str | None]:
    """The by-products of a finished run, and why there are none where they cannot be had.

    They are those of the best epoch, which the method goes back to; `settle` takes them to the target's device. Of
    several ranks the first alone has them.
    """
    if rank() or not method.has_byproducts():
        return {}, None
    best = checkpoint.load(folder / checkpoint.BEST, mapped=True)
    if kept := best.get("method") or best.get("okdc", {}).get("method"):  # the second, of an older okdc
        method.load_state_dict(kept)
    try:
        networks = method.eval().byproducts()
    except Exception as error:  # whatever it is, the student is trained and must come out
        return {}, f"{type(error).__name__}: {error}"
    return {name: settle(network.eval()) for name, network in networks.items()}, None


def export(
    networks: dict[str, nn.Module],
    lost: str | None,
    data: Data,
    settings: ExportSettings,
    folder: Path,
    info: dict[str, Any],
    task: Task,
) -> list[dict[str, Any]]:
    """Write a bundle of each to `folder`/byproducts/NAME; what each is and how it did, as the report shows it.

    `lost` says why there are none. One that cannot be exported, or fails a gate, is said so in its row and costs the
    others nothing. Each is written as a torch program, too: it has no name by which it could be built again.
    """
    settings, rows = replace(settings, torch=True), []
    for name, network in networks.items():
        row = {"name": name, **_size(network, data.preprocess["input_size"]), "reason": None}
        try:
            verification = deploy.export_bundle(
                network, data, settings, folder / FOLDER / name, arch=_arch(network),
                info={**info, "title": f"{info['title']} · {name}", "metrics": {}}, task=task,
            )  # fmt: skip
        except deploy.UnfitError as error:
            verification, row["reason"] = error.verification, str(error)
        except OkdcError as error:
            verification, row["reason"] = None, str(error)
        rows.append(row | {"verdict": "fail", task.metric: None, "latency": []} | _figures(verification, task))
    nothing: dict[str, Any] = {"name": "none", "params": None, "flops": None, "verdict": "fail", "latency": []}
    return rows + ([nothing | {"reason": lost}] if lost else [])


def student_row(
    name: str, network: nn.Module, data: Data, verification: Verification | None, task: Task
) -> dict[str, Any]:
    """The student's own row, to compare the by-products with."""
    return {
        "name": name,
        **_size(network, data.preprocess["input_size"]),
        "reason": None,
        **_figures(verification, task),
    }


def _figures(verification: Verification | None, task: Task) -> dict[str, Any]:
    if verification is None:
        return {}
    rows = {row["name"]: row for row in verification["rows"]}
    shipped = next((row for row in verification["rows"] if row["file"] and row["precision"] == "fp32"), rows["torch"])
    return {
        "verdict": verification["verdict"], task.metric: dict(rows["torch"]).get(task.metric), "mb": shipped["mb"],
        "agreement": shipped["agreement"], "latency": shipped["latency"],
    }  # fmt: skip


def _size(network: nn.Module, input_size: tuple[int, ...]) -> dict[str, int]:
    first = next(network.parameters())
    example = torch.zeros(1, *input_size, device=first.device, dtype=first.dtype)
    with torch.no_grad(), at_rest(network), FlopCounterMode(display=False) as counter:
        network.eval()(example)
    return {"params": sum(p.numel() for p in network.parameters()), "flops": counter.get_total_flops()}


def _arch(network: nn.Module) -> str:
    """The name by which timm builds such a network, or, where that gives other shapes (a narrower one), its type."""
    name = (getattr(network, "pretrained_cfg", None) or {}).get("architecture")
    if not (name and timm.is_model(name)):
        return type(network).__name__
    with torch.device("meta"):
        like = timm.create_model(name, num_classes=getattr(network, "num_classes", 1000))
    shapes = ({key: value.shape for key, value in each.state_dict().items()} for each in (network, like))
    return name if next(shapes) == next(shapes) else type(network).__name__
