"""What is compared: the student in torch, an exported file, a pipeline of raw images; each a function to logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from okdc.verification.alone import Alone

Run = Callable[[np.ndarray], np.ndarray]  # (B, C, H, W) float32, normalised -> (B, C) logits


Pipeline = Callable[[Sequence[Any]], np.ndarray]  # B raw PIL images -> (B, C) logits


@dataclass(frozen=True)
class Exported:
    """A file that was exported, the export target's module that can run it, and why it could not be written, if so.

    device: the one it is for, whatever the others run on; where that is not to be had, the file is skipped.
    tolerance: that of its logits, where it is not the module's TOLERANCE. precision: what it is judged as, where it is
    not its PRECISION. runtime: what runs it in a process of its own, where `module` is a runtime's, with `options` as
    keywords.
    """

    path: Path
    module: ModuleType
    problem: str | None = None
    device: str | None = None
    tolerance: float | None = None
    precision: str | None = None
    runtime: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def torch_runner(student: nn.Module, device: str = "cpu") -> Run:
    """A runner of the student itself: a copy in eval mode and fp32 on the device; the student is left as it is."""
    network = copy.deepcopy(student).eval().float().to(device)

    def run(images: np.ndarray) -> np.ndarray:
        # TF32 would cost the reference three digits.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return network(torch.from_numpy(images).to(device)).cpu().numpy()

    return run


def logits_of(run: Callable[[Any], np.ndarray], images: Any, reference: np.ndarray | None) -> np.ndarray:
    """What the runner gives, (B, C); raises ValueError if its shape is not the reference's."""
    out = run(images)
    if reference is not None and out.shape != reference.shape:
        raise ValueError(f"its output has the shape {out.shape}, torch's has {reference.shape}")
    return out


def start(exported: Exported, device: str) -> tuple[Run, str]:
    """A runner on its own device, else on `device`, or on the CPU where that backend has none; its provider tells."""
    if exported.runtime:
        kind = getattr(exported.module, "DEVICE", "cpu")
        where = device if device.startswith(kind) else kind
        return Alone(str(exported.module.__file__), exported.path, where, exported.options), where
    if exported.device:
        return exported.module.runner(exported.path, device=exported.device), exported.device
    if getattr(exported.module, "MADE_FOR", None) == "cpu":
        device = "cpu"
    try:
        run = exported.module.runner(exported.path, device=device)
        return run, getattr(run, "device", device)  # an engine has its own, whatever is asked for
    except Exception:
        if device == "cpu":
            raise
        return exported.module.runner(exported.path, device="cpu"), "cpu"
