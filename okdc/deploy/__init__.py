"""From a student to a bundle that is safe to ship: written, verified, put in place all at once.

Export targets are the files of `export/`.

Imports: `errors`, `networks`, `okdc`, `recipe`, `system`, `tasks`, `verification`.
"""

from __future__ import annotations

from okdc.deploy.bundle import check_sums, is_known
from okdc.deploy.export import UnfitError, export_bundle, failed_folder, failures, read, task_of, verify_bundle
from okdc.deploy.rehearsal import refuse_unexportable
from okdc.deploy.runtimes import not_installed, not_run
from okdc.deploy.statement import UNKNOWN
from okdc.deploy.targets import asked, not_written, unavailable

__all__ = [
    "UNKNOWN",
    "UnfitError",
    "asked",
    "check_sums",
    "export_bundle",
    "failed_folder",
    "failures",
    "is_known",
    "not_installed",
    "not_run",
    "not_written",
    "read",
    "refuse_unexportable",
    "task_of",
    "unavailable",
    "verify_bundle",
]
