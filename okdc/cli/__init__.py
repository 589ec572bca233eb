"""The command line: reads options, calls one function, prints.

Nothing heavy is imported before a command runs: `okdc --help` comes without torch.
"""

from __future__ import annotations

from okdc.cli.commands import main

__all__ = ["main"]
