"""The student of a bundle as a runner, eager or compiled: the module that times it, in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def runner(
    path: str | Path, device: str = "cpu", threads: int | None = None, *, compiled: bool = False
) -> Callable[[np.ndarray], np.ndarray]:
    """A function (B, C, H, W) float32 -> (B, classes) float32, torch in float32 as it comes.

    path: the bundle's folder. compiled: one graph per batch size, on a GPU replayed as a CUDA graph, as engines are
    timed. Raises RuntimeError where timm and torchvision cannot
    build the network.
    """
    import torch

    from okdc.deploy import bundle

    network = bundle.load_student(Path(path))
    if network is None:
        raise RuntimeError("neither timm nor torchvision can build this network from the bundle")
    network = network.to(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means it in the other files, too
    if threads:
        torch.set_num_threads(threads)
    mode = "reduce-overhead" if torch.device(device).type == "cuda" else None
    forward = torch.compile(network, dynamic=False, mode=mode) if compiled else network

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return forward(torch.from_numpy(images).to(device)).cpu().numpy()

    return run
