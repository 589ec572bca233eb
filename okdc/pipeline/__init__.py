"""The steps in order: recipe, data, network, cohort, training, strip, export, verification, report.

The only wing that knows all the steps; read `compression.compress` top to bottom.

Imports: `anatomy`, `cohort`, `data`, `deploy`, `errors`, `losses`, `methods`, `needs`, `networks`, `okdc`, `ranks`,
`recipe`, `report`, `system`, `tasks`, `training`.
"""

from __future__ import annotations

from okdc.pipeline.compression import compress
from okdc.pipeline.exporting import export, verify
from okdc.pipeline.inspecting import inspect
from okdc.pipeline.result import Result

__all__ = ["Result", "compress", "export", "inspect", "verify"]
