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
    mixed: bool = False
    """With pairs or indices: it takes images that mixup and cutmix made of two, and is then told of which and how much.

    Batches are (images, labels (B, classes), indices (B, 2) of an image and of the one in it, the first's shares (B,)).
    """
    held_out: bool = False
    """A share of the training images set aside, given to `Method.before_epoch`."""


NOTHING = Needs()
