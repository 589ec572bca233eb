"""okdc measuring itself: what a method would build and cost, what a step takes, every format side by side.

It runs the pipeline's own parts. Imports `pipeline` and below; hands nothing on, so that each command loads its own.
"""

from __future__ import annotations
