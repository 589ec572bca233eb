"""okdc measuring itself: what a method would build and cost, what a step takes, every format side by side.

It runs the pipeline's own parts.

Imports: `anatomy`, `cohort`, `data`, `deploy`, `errors`, `methods`, `needs`, `networks`, `okdc`, `pipeline`, `recipe`,
`system`, `tasks`, `training`, `verification`.
"""

from __future__ import annotations
