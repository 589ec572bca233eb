"""What several tasks are made of, and the parts of one that would fill its file."""

from __future__ import annotations
