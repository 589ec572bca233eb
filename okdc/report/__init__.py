"""What a run did, for people: report.html, report.md and report.json, from plain values.

Imports: `recipe`, `system`.
"""

from __future__ import annotations

from okdc.report.report import write

__all__ = ["write"]
