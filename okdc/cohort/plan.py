"""What a cohort is made from and what comes of it: the plan of each branch, what members say, what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class CohortOutput:
    """What M members said about one batch: tuples of M tensors, member 0 is the target."""

    logits: tuple[Tensor, ...]  # (B, C)
    feature_maps: tuple[Tensor, ...] = ()  # (B, D, H, W); tokens are (B, D, N, 1); empty unless tapped
    embeddings: tuple[Tensor, ...] = ()  # (B, D); empty unless tapped
    shared: Tensor | None = None  # what the trunk gave at the (first branch's) cut, a map as above; None unless tapped
    teacher: Tensor | None = None  # (B, C), a constant, of a network outside the cohort; None where there is none
    earlier: tuple[tuple[Tensor, ...], ...] = ()  # of each member, what its stages before the last said, if they do
    stage_maps: tuple[tuple[Tensor, ...], ...] = ()  # of each member, its stages' outputs after the cut, as maps above


@dataclass(frozen=True)
class Branch:
    """The plan of one auxiliary member.

    `cut` is the module after which it parts (None: it shares nothing, a peer network), `extra_blocks` how many blocks
    are appended to each stage that it has for itself, early to late (or, negative, taken away), `network` another
    architecture for a peer, `width` the share of its channels that it keeps (above 0, at most 1; it needs okdc[prune]),
    `parent` the member from which it parts, an earlier one: another than the target makes a tree.
    """

    cut: str | None = None
    extra_blocks: tuple[int, ...] = ()
    network: nn.Module | None = None
    width: float = 1.0
    parent: int = 0

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
