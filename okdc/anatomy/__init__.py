"""What a network is made of, learned by running it once: stages, blocks, cuts, classifier, feature map.

Imports: `errors`, `system`, `tasks`.
"""

from __future__ import annotations

from okdc.anatomy.anatomy import Anatomy, Cut, inspect
from okdc.anatomy.calls import Call
from okdc.anatomy.classifier import classifiers
from okdc.anatomy.stages import Stage

__all__ = ["Anatomy", "Call", "Cut", "Stage", "classifiers", "inspect"]
