"""The class `Method` (`base`), and what several methods are made of; a method imports this and never another method."""

from __future__ import annotations
