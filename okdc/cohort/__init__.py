"""The target with its branches: recorded, replayed, grown, proved, and stripped again.

Attach and strip are both in `cohort`. Imports `anatomy`, `tasks` and below; never a method.
"""

from __future__ import annotations

from okdc.cohort.cohort import Cohort
from okdc.cohort.plan import Branch, CohortOutput, Cost

__all__ = ["Branch", "Cohort", "CohortOutput", "Cost"]
