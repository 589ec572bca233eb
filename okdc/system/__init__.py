"""What okdc asks of the operating system: files, signals, waits, random states, words without local paths.

Knows nothing of networks or training.

Imports: `errors`, `ranks`.
"""

from __future__ import annotations
