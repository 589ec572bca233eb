"""What a method asks of its training batches beyond images and labels; data meets it or says why it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from okdc.errors import MethodError

STRENGTHS = ("weak", "strong")


@dataclass(frozen=True)
class Needs:
    """Declared by a method (`Method.needs`), met by `okdc.data`; by default images (B, C, H, W) and labels (B,)."""

    views: bool | int | tuple[Literal["weak", "strong"], ...] = False
    """Several augmentations of each image, (views, B, C, H, W): True, one for each member; a number, so many.

    A tuple says how strong each is: "weak" is crops and flips alone, "strong" all that the user asks for.
    """
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

    def __post_init__(self) -> None:
        """MethodError for views that there are not."""
        views = self.views
        known = all(each in STRENGTHS for each in views) and len(views) > 1 if isinstance(views, tuple) else False
        if not (isinstance(views, bool) or known or (isinstance(views, int) and views > 1)):
            raise MethodError(
                f"Needs(views={views!r}): expected True, one for each member, or a number of 2 or more, or how strong "
                'each is: a tuple of two or more of "weak" and "strong".'
            )

    def strengths(self, members: int) -> tuple[str, ...]:
        """How strong each view of an image is, where there are so many members; one alone where none is asked for."""
        if isinstance(self.views, tuple):
            return self.views
        return ("strong",) * ((members if self.views else 1) if isinstance(self.views, bool) else self.views)


NOTHING = Needs()
