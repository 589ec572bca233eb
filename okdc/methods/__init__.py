"""The methods: one file each, found by its file name; `package.module:Class` or `file.py:Class` names one from outside.

What a method may say is the class `Method` in `shared/base`; `shared/building` puts one together with its cohort, and
`shared/checks` and `shared/trial` tell an author's mistakes before training.

Imports: `anatomy`, `cohort`, `errors`, `losses`, `needs`, `ranks`, `system`, `tasks`.
"""

from __future__ import annotations

from okdc.methods.shared.base import Method
from okdc.methods.shared.building import build
from okdc.methods.shared.first_passes import FirstGradients, first_gradients, pace
from okdc.methods.shared.loading import card, get, name_of, names, refuse_settings, refuse_task, settings
from okdc.methods.shared.pausing import Pause
from okdc.methods.shared.trial import batch_of

__all__ = [
    "FirstGradients", "Method", "Pause", "batch_of", "build", "card", "first_gradients", "get", "name_of", "names",
    "pace", "refuse_settings", "refuse_task", "settings",
]  # fmt: skip
