"""What a run did, for people: report.html, report.md and report.json, from plain values.

Imports: `errors`, `recipe`, `system`, `tasks`.
"""

from __future__ import annotations

from okdc.report.comparison import write_comparison
from okdc.report.notebook import of_comparison, of_run
from okdc.report.report import write
from okdc.report.words import duration

__all__ = ["duration", "of_comparison", "of_run", "write", "write_comparison"]
