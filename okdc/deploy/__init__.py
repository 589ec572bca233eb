"""From a student to a bundle that is safe to ship: written, verified, put in place all at once.

Export targets are the files of `export/`. Imports `verification`, `networks`, `recipe` and below.
"""

from __future__ import annotations

from okdc.deploy.export import (
    UnfitError,
    check_sums,
    environment,
    export_bundle,
    failed_folder,
    failures,
    read,
    verify_bundle,
)

__all__ = [
    "UnfitError",
    "check_sums",
    "environment",
    "export_bundle",
    "failed_folder",
    "failures",
    "read",
    "verify_bundle",
]
