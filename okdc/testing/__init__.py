"""For authors of methods: what every method has to do, tried on any class, and numbers of an author's own code.

`check` runs all of it and says what it found (`okdc check METHOD` prints it). `contract` has each demand by itself, for
a test; `processes` holds two processes against one; `golden` reads numbers that somebody else's code gave.

Imports: `anatomy`, `errors`, `methods`, `needs`, `networks`, `ranks`, `recipe`, `system`, `training`.
"""

from __future__ import annotations

from okdc.testing import golden
from okdc.testing.case import Case
from okdc.testing.contract import DEMANDS, birth, labels, learns, means, precision, resume, student
from okdc.testing.processes import two_processes
from okdc.testing.report import Report, Row, check

__all__ = [
    "DEMANDS",
    "Case",
    "Report",
    "Row",
    "birth",
    "check",
    "golden",
    "labels",
    "learns",
    "means",
    "precision",
    "resume",
    "student",
    "two_processes",
]
