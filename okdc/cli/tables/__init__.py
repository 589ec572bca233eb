"""What commands print when they are done: tables that a person understands, and the same as plain values for --json."""

from __future__ import annotations

from okdc.cli.tables.anatomies import (
    facts_of_anatomy,
    facts_of_estimate,
    show_anatomy,
    show_estimate,
    show_row,
    show_sweep,
)
from okdc.cli.tables.comparisons import facts_of_comparison, show_benchmark, show_comparison, show_profile
from okdc.cli.tables.listings import facts_of_method, settings_of, show_findings, show_methods
from okdc.cli.tables.results import facts_of_result, prediction, show_result, show_verification

__all__ = [
    "facts_of_anatomy",
    "facts_of_comparison",
    "facts_of_estimate",
    "facts_of_method",
    "facts_of_result",
    "prediction",
    "settings_of",
    "show_anatomy",
    "show_benchmark",
    "show_comparison",
    "show_estimate",
    "show_findings",
    "show_methods",
    "show_profile",
    "show_result",
    "show_row",
    "show_sweep",
    "show_verification",
]
