"""What a run did, for people: report.html, report.md and report.json, from plain values.

Imports: `recipe`, `system`, `tasks`.
"""

from __future__ import annotations

from okdc.report.comparison import write_comparison
from okdc.report.report import write
from okdc.report.words import duration

__all__ = ["duration", "write", "write_comparison"]
