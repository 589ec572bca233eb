"""What a cohort is made from and what comes of it: the plan of each branch, what members say, what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from okdc.errors import CutError


class Untapped:
    """Stands where nothing was tapped, so that who looks at it is told: any use of it is a CutError."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self, *_: Any) -> NoReturn:
        if self.name == "tapped":
            raise CutError(
                "out.tapped is looked at, and no module was named. Write a classmethod `tapped(cls, anatomy, "
                '**settings)` that names some, such as {"early": "layer1.1"}, or say Cohort(..., tapped={...}) where a '
                "cohort is made by hand."
            )
        views = " With a view for each member there is none." if self.name == "shared" else ""
        raise CutError(
            f'out.{self.name} is looked at, and not tapped. Say taps = ("{self.name}",) in the class of the method, or '
            f'Cohort(..., taps=("{self.name}",)) where a cohort is made by hand.{views}'
        )

    __iter__ = __len__ = __getitem__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python asks of everything
            raise AttributeError(name)
        self._refuse()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        next(each for each in (*args, *(kwargs or {}).values()) if isinstance(each, cls))._refuse()


# Passed by name, not defaults of the fields, which a compiled step could not make.
UNTAPPED: dict[str, Any] = {
    name: Untapped(name) for name in ("feature_maps", "embeddings", "shared", "stage_maps", "exit_maps", "tapped")
}


@dataclass(frozen=True)
class CohortOutput:
    """What M members said about one batch: tuples of M tensors, member 0 is the target.

    Of a cohort, whatever is not tapped is a CutError when it is looked at.
    """

    logits: tuple[Tensor, ...]
    """(B, C), of every member."""
    feature_maps: tuple[Tensor, ...] = ()
    """(B, D, H, W); tokens are (B, D, N, 1)."""
    embeddings: tuple[Tensor, ...] = ()
    """(B, D), what each classifier is given."""
    shared: Tensor | None = None
    """What the trunk gave at the (first branch's) cut, a map as above; with a view for each member there is none."""
    teacher: Tensor | None = None
    """(B, C), a constant, of a network outside the cohort; None where there is none."""
    stage_maps: tuple[tuple[Tensor, ...], ...] = ()
    """Of each member, its stages' outputs after the cut, as maps above."""
    exit_maps: tuple[Tensor, ...] = ()
    """Of the target, what its modules gave after which it could be left early (`Anatomy.exits`), as maps above."""
    tapped: tuple[dict[str, Any], ...] = ()
    """Of each member, what modules that were named (`Method.tapped`) gave, as they gave it."""
    earlier: tuple[tuple[Tensor, ...], ...] = ()
    """Of each member, what its stages before the last said, where its task lets them: lists of heat maps."""


@dataclass(frozen=True)
class Branch:
    """The plan of one auxiliary member."""

    cut: str | None = None
    """The module after which it parts; None: it shares nothing, a peer network."""
    extra_blocks: tuple[int, ...] = ()
    """How many blocks are appended to each stage that it has for itself, early to late; negative: taken away."""
    network: nn.Module | None = None
    """Another architecture, for a peer."""
    width: float = 1.0
    """The share of its channels that it keeps, above 0, at most 1; below 1 it needs okdc[prune]."""
    outputs: int = 0
    """How many outputs its classifier has, where that is another number than the target's; 0: as many."""
    parent: int = 0
    """The member from which it parts, an earlier one; another than the target makes a tree."""

    @property
    def parting(self) -> str | None:
        """Where it parts, in words; None where it shares nothing."""
        return f"{self.cut} of branch{self.parent}" if self.parent else self.cut


@dataclass(frozen=True)
class Cost:
    """What one network costs: its parameters, those of them that are its own, and the FLOPs that it adds per image."""

    name: str
    params: int
    own_params: int
    flops: int
    grown: str  # what it has that the target has not, or what it is
    cut: str | None = None  # where it parts, in words
    frozen: bool = False  # run, not trained


def member_name(member: int, shares: bool = True) -> str:
    """What a member is called: the target, a branch, or a peer where it shares nothing."""
    return f"{'branch' if shares else 'peer'}{member}" if member else "target"


def lineage(branches: Sequence[Branch], member: int) -> list[int]:
    """The members that run before a branch because it parts from them, the target first."""
    found = [branches[member - 1].parent]
    while found[0]:
        found.insert(0, branches[found[0] - 1].parent)
    return found
