"""The clock of a verification without its warm-up and with the fewest samples: nothing here asks how fast a file is.

As the clock itself, it is loaded by its path in the process of each runner, and must not import torch or okdc.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[2] / "okdc" / "verification" / "latency.py"
_SPEC = importlib.util.spec_from_file_location("latency", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
_CLOCK = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_CLOCK)
_CLOCK.WARM_UP = _CLOCK.SECONDS = 0.0
measure = _CLOCK.measure
