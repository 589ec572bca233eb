"""The target with its branches: recorded, replayed, grown, proved, and stripped again.

`plan` says what is asked for, `replay` and `trunk` how branches share the target's trunk, `birth`, `depth` and `width`
how they differ from it, `proof` that they compute the same, `known` what was proved before, `taps` what methods look
at; `cohort` attaches and strips.

Imports: `anatomy`, `errors`, `system`, `tasks`.
"""

from __future__ import annotations

from okdc.cohort.cohort import Cohort
from okdc.cohort.known import Found, Known, has_versions
from okdc.cohort.plan import Branch, CohortOutput, Cost

__all__ = ["Branch", "Cohort", "CohortOutput", "Cost", "Found", "Known", "has_versions"]
