"""The command line: reads options, calls one function, prints.

Nothing heavy is imported before a command runs: `okdc --help` comes without torch.

Imports: `anatomy`, `comparing`, `deploy`, `errors`, `measure`, `methods`, `networks`, `okdc`, `pipeline`, `recipe`,
`report`, `system`, `tasks`, `testing`, `training`.
"""

from __future__ import annotations

from okdc.cli.group import main

# isort: off
from okdc.cli import run_commands, compare_command, measure_commands, list_commands  # noqa: F401  (the order is that of --help)

__all__ = ["main"]
