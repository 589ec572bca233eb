"""The networks of L-MCL: each with a branch after every stage, heads, aggregators, and the matching of their layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.anatomy import Anatomy, Stage, inspect
from okdc.cohort import Branch, Cohort, CohortOutput, Cost
from okdc.errors import CutError
from okdc.methods.shared.contrast import EmbeddingHead


class Taps(NamedTuple):
    """What one network says at its S taps, early to late, the network's own end last."""

    logits: Tensor  # (S, B, C)
    features: Tensor  # (S, B, D), pooled
    embeddings: Tensor  # (S, B, d), of unit length


class Towers(nn.Module):
    """Whole networks, each the trunk of a cohort with a branch after every stage but the last; strip takes them off.

    Branches have all blocks of the later stages, or the first of each where they are `short`. CutError where a network
    cannot have such branches; all of them are then as they were.
    """

    def __init__(self, networks: Cohort, width: int, short: bool) -> None:
        super().__init__()
        self.cohorts = nn.ModuleList()
        self.widths: list[tuple[int, ...]] = []  # of every network's taps, early to late
        try:
            for network in networks.members:
                own = network is networks.target
                known = networks.anatomy if own and networks.anatomy.stages else None
                tower = _tower(network, networks.anatomy.input_size, short, networks.pretrained and own, known)
                self.cohorts.append(tower)
                self.widths.append(_taps_last(tower.embedding_widths))
        except BaseException:
            self.strip()
            raise
        self.heads = nn.ModuleList(nn.ModuleList(EmbeddingHead(d, width) for d in taps) for taps in self.widths)

    def forward(self, images: Tensor) -> list[Taps]:
        """Images (B, C, H, W) to the taps of every network."""
        return [self._taps(cohort(images), heads) for cohort, heads in zip(self.cohorts, self.heads, strict=True)]

    @staticmethod
    def _taps(out: CohortOutput, heads: Any) -> Taps:
        logits, features = _taps_last(out.logits), _taps_last(out.embeddings)
        embeddings = [head(x) for head, x in zip(heads, features, strict=True)]
        return Taps(torch.stack(logits), torch.stack(features), torch.stack(embeddings))

    def costs(self, names: Sequence[str]) -> tuple[Cost, ...]:
        """What the branches cost of networks that are called so."""
        towers: Any = zip(names, self.cohorts, strict=True)
        return tuple(
            replace(cost, name=f"{name}_tap{k + 1}") for name, tower in towers for k, cost in enumerate(tower.costs[1:])
        )

    def strip(self) -> None:
        for cohort in self.cohorts:
            cohort.strip()  # type: ignore[operator]


def _taps_last(of_members: Sequence) -> tuple:
    """A cohort's members in the order of their depth: its branches, then the network itself."""
    return (*of_members[1:], of_members[0])


def _tower(
    network: nn.Module, input_size: tuple[int, ...], short: bool, pretrained: bool, anatomy: Anatomy | None
) -> Cohort:
    first = next(network.parameters())
    example = torch.randn(2, *input_size, device=first.device, dtype=first.dtype)
    anatomy = anatomy or inspect(network, example)
    places = tap_places(anatomy)
    plans = [Branch(p, tuple(-_spare(network, s, p) for s in anatomy.stages_after(p)) if short else ()) for p in places]
    try:
        return Cohort(network, example, plans, taps=("embeddings",), pretrained=pretrained, anatomy=anatomy)
    except CutError as error:
        reason = re.split(" (?:Cut elsewhere|Train whole)", str(error))[0]  # here the user has no say in where
        raise CutError(
            f"lmcl gives every network a branch after each of {', '.join(places)}, but {reason} "
            "Choose --method mcl, which looks at the last embedding alone."
        ) from error


def tap_places(anatomy: Anatomy) -> list[str]:
    """The modules after which branches part: each stage but the last; of a single one, each third of its blocks."""
    places = [stage.before for stage in anatomy.stages[1:] if stage.before]
    if places:
        return places
    blocks = anatomy.stages[0].blocks
    if len(blocks) >= 3:
        return [blocks[math.ceil(len(blocks) * third / 3) - 1][-1] for third in (1, 2)]
    return [anatomy.cut()]


def _spare(network: nn.Module, stage: Stage, place: str) -> int:
    """How many of a stage's blocks a branch that parts after `place` can do without; its first block stays."""
    if not stage.blocks:
        return 0
    parent, _, first = stage.blocks[0][0].rpartition(".")
    names = [name for name, _ in network.get_submodule(parent).named_children()]
    ahead = names[: names.index(first)]
    # A ResNet's first block is the strided one, which is not counted among those that keep their input's shape.
    opens = not ahead or place == f"{parent}.{ahead[-1]}"
    return len(stage.blocks) - opens


class Aggregator(nn.Module):
    """The mean of S logits, weighed for each image by what all taps see: taps of one network to (B, C)."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sum(widths), widths[-1])
        self.fc2 = nn.Linear(widths[-1], len(widths))

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            x = features.transpose(0, 1).flatten(1).to(self.fc1.weight.dtype)
            weights = torch.softmax(self.fc2(F.relu(self.fc1(x))), dim=1)
            return torch.einsum("bs,sbc->bc", weights, logits.to(weights.dtype))


class Matching(nn.Module):
    """How much two layers teach each other about an image: features (S_i, B, D) to weights (S_i, S_j, B), all i < j.

    The sigmoid of a cosine, so between 0.27 and 0.73.
    """

    def __init__(self, widths: Sequence[Sequence[int]], width: int = 128) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.ModuleList(nn.Linear(d, width) for d in taps) for taps in widths)

    def forward(self, features: Sequence[Tensor]) -> dict[tuple[int, int], Tensor]:
        with torch.autocast(features[0].device.type, enabled=False):
            points = [self._project(i, x) for i, x in enumerate(features)]
            return {
                (i, j): torch.sigmoid(torch.einsum("kbd,lbd->klb", points[i], points[j]))
                for i, j in combinations(range(len(points)), 2)
            }

    def _project(self, network: int, features: Tensor) -> Tensor:
        layers: Any = self.projections[network]
        return torch.stack([F.normalize(p(x.to(p.weight.dtype))) for p, x in zip(layers, features, strict=True)])
