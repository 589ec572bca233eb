"""What measurements depend on: versions, processor, accelerator."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import okdc
from okdc.deploy import targets

_PACKAGES = ("torch", "torchvision", "timm", "numpy")


def environment(device: str) -> dict[str, Any]:
    """What measurements on `device` depend on: versions, processor, accelerator (the first where it is the CPU).

    The packages are torch's and those that the export targets name, as far as they are in use.
    """
    packages = dict.fromkeys([*_PACKAGES, *(name for each in targets.known().values() for name in each.packages)])
    versions = {name: str(getattr(sys.modules.get(name), "__version__", "")) for name in packages}
    place = device if device.startswith("cuda") else "cuda:0"
    gpu = torch.cuda.get_device_name(place) if torch.cuda.is_available() else None
    facts = {"okdc": okdc.__version__, "python": platform.python_version(), "os": platform.platform()}
    return facts | {"cpu": _processor(), "gpu": gpu} | {name: version for name, version in versions.items() if version}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
