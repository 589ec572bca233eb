"""What a method asks of its training batches beyond images and labels; data meets it or says why it cannot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """Declared by a method (`Method.needs`), met by `okdc.data`; by default images (B, C, H, W) and labels (B,)."""

    views: bool = False
    """An augmentation of its own for every member: images (members, B, C, H, W)."""
    pairs: bool = False
    """Batches in which every class that occurs has two images or more."""
    indices: bool = False
    """A third tensor (B,), which training image each one is; and the label of every one."""
    held_out: bool = False
    """A share of the training images set aside, given to `Method.before_epoch`."""


NOTHING = Needs()
