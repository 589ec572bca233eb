"""From a student to a bundle that is safe to ship: written, verified, put in place all at once.

Export targets are the files of `export/`.

Imports: `errors`, `networks`, `okdc`, `recipe`, `system`, `verification`.
"""

from __future__ import annotations

from okdc.deploy.bundle import check_sums
from okdc.deploy.export import UnfitError, export_bundle, failed_folder, failures, read, verify_bundle
from okdc.deploy.runtimes import not_installed, not_run
from okdc.deploy.targets import asked, not_written, unavailable

__all__ = [
    "UnfitError",
    "asked",
    "check_sums",
    "export_bundle",
    "failed_folder",
    "failures",
    "not_installed",
    "not_run",
    "not_written",
    "read",
    "unavailable",
    "verify_bundle",
]
