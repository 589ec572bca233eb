"""What a run did, for people: report.html, report.md, report.json and results.png, from plain values.

Imports: `errors`, `recipe`, `system`, `tasks`.
"""

from __future__ import annotations

from okdc.report.comparison import write_comparison
from okdc.report.examples import picture, unnormalised
from okdc.report.keypoints import pictured
from okdc.report.notebook import of_comparison, of_run
from okdc.report.report import write
from okdc.report.words import duration

__all__ = ["duration", "of_comparison", "of_run", "picture", "pictured", "unnormalised", "write", "write_comparison"]
