"""The one training loop."""

from __future__ import annotations

from okdc.training.loop import fit
from okdc.training.state import TrainState

__all__ = ["TrainState", "fit"]
