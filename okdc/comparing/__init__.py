"""Does it help? Methods and plain training side by side, with the controls that a sceptic asks for.

Each (method, seed) is an ordinary run of the pipeline; read `comparison.compare` top to bottom.

Imports: `data`, `errors`, `measure`, `methods`, `networks`, `pipeline`, `recipe`, `report`, `system`, `tasks`.
"""

from __future__ import annotations

from okdc.comparing.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
