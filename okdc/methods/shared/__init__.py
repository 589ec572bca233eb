"""What several methods are made of; a method imports this, `cohort`, `losses` and never another method."""

from __future__ import annotations
