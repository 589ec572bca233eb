"""Every exported file on the same images as torch: compared, timed, judged; no export target is known by name but onnx,
which the others are weighed against.

Imports: `errors`, `system`, `tasks`.
"""

from __future__ import annotations

from okdc.verification.comparison import compare, failed_row
from okdc.verification.gates import Gates
from okdc.verification.runners import Exported, Pipeline, torch_runner
from okdc.verification.sample import take

__all__ = ["Exported", "Gates", "Pipeline", "compare", "failed_row", "take", "torch_runner"]
