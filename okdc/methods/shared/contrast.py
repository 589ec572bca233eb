"""Mutual contrastive learning, which MCL and L-MCL share. Also: S taps, d width of embeddings, K candidates, N images.

Anchors are the images of a batch; candidates are the batch itself, or rows of memory banks. See Yang et al., AAAI 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import ceil, log1p, sqrt
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.errors import DataError
from okdc.methods.shared.mixing import Mixed, positives
from okdc.ranks import drawn_together, gather, rank, world
from okdc.system.randomness import uniform


class EmbeddingHead(nn.Module):
    """Linear, ReLU, Linear, and unit length: features (B, D) to embeddings (B, d), in at least float32."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(self.fc2(F.relu(self.fc1(features.to(self.fc1.weight.dtype)))))


class Terms(NamedTuple):
    """Contrast within each network (vcl) and between networks (icl), and the imitation of each other's (soft)."""

    vcl: Tensor
    soft_vcl: Tensor
    icl: Tensor
    soft_icl: Tensor


def mutual_contrast(
    embeddings: Sequence[Tensor],
    labels: Tensor,
    rows: Sequence[Tensor] | None = None,
    weights: Mapping[tuple[int, int], Tensor] | None = None,
    *,
    tau: float,
    temperature: float,
    mixed: Mixed | None = None,
) -> Terms:
    """The four terms, summed over all pairs i < j of networks and of their taps, each pair taken both ways.

    Network i gives embeddings (S_i, B, d). Candidates are the batch, labels (B,) or (B, C), or where given `rows`
    (B, K, d) of each network's bank: own, same class, others. `weights[i, j]` (S_i, S_j, B) are those of the anchors.
    `mixed`: of what the anchors, and where there are no rows the candidates, are mixed.
    """
    if rows is None:
        batch = _Batch(_of_all_ranks(embeddings), labels, mixed)
    pairs = []
    with torch.autocast(embeddings[0].device.type, enabled=False):
        for i, j in combinations(range(len(embeddings)), 2):
            a, b = embeddings[i], embeddings[j]
            weight = a.new_ones(len(a), len(b), a.shape[1]) if weights is None else weights[i, j]
            if rows is not None and mixed is not None and mixed.rows is not None:
                shares, others = mixed.shares.to(weight), mixed.rows
                pairs.append(_in_banks(a, b, weight * shares, rows[i], rows[j], tau, temperature))
                pairs.append(_in_banks(a, b, weight * (1 - shares), others[i], others[j], tau, temperature))
            elif rows is None:
                pairs.append(_in_batch(a, b, weight, batch, i, j, tau, temperature))
            else:
                pairs.append(_in_banks(a, b, weight, rows[i], rows[j], tau, temperature))
    return Terms(*(torch.stack(values).sum() for values in zip(*pairs, strict=True)))


def _of_all_ranks(embeddings: Sequence[Tensor]) -> Sequence[Tensor]:
    """Embeddings (S, B, d) of each network as those of the whole batch, (S, N, d), told in one message."""
    return embeddings if world() == 1 else gather(torch.cat(list(embeddings)), 1).split([len(x) for x in embeddings])


class _Batch:
    """The candidates, which are the batch of all ranks: embeddings (S, N, d) of each network, and what of the own
    anchors (B,) they are; `share` of the whole batch's mean over its anchors is a sum over the own ones.
    """

    def __init__(self, everyone: Sequence[Tensor], labels: Tensor, mixed: Mixed | None = None) -> None:
        self.everyone = everyone
        labels = labels if labels.dim() == 1 else labels.argmax(1)
        place = rank() * len(labels) + torch.arange(len(labels), device=labels.device)
        every = torch.arange(world() * len(labels), device=labels.device)
        self.others = every != place[:, None]  # no image is its own candidate
        if mixed:
            self.positives = positives(mixed, self.others, everyone[0].dtype)
            anchors = gather(self.positives.sum(1)).sum()
        else:
            every = gather(labels)
            self.positives = self.others & (labels[:, None] == every)
            ordered = every.sort().values
            twins = ordered[1:] == ordered[:-1]
            anchors = (F.pad(twins, (0, 1)) | F.pad(twins, (1, 0))).sum()  # those of all ranks that have a positive
        self.share = world() / anchors.clamp_min(1)  # over the ranks, losses are averaged


def _in_batch(
    a: Tensor, b: Tensor, weight: Tensor, batch: _Batch, i: int, j: int, tau: float, temperature: float
) -> Terms:
    """Own anchors (S, B, d) of networks i and j against the batch, in the other network too."""
    all_a, all_b = batch.everyone[i], batch.everyone[j]
    inter = a[:, None] @ all_b[None].mT / tau
    back = inter.mT if all_b is b else b[None] @ all_a[:, None].mT / tau
    own = (a @ all_a.mT / tau)[:, None], (b @ all_b.mT / tau)[None]
    positives, others, share = batch.positives, batch.others, batch.share
    vcl = _both_ways(*own, positives, others, weight, temperature, share)
    icl = _both_ways(inter, back, positives, others, weight, temperature, share)
    return Terms(*vcl, *icl)


def _in_banks(
    a: Tensor, b: Tensor, weight: Tensor, rows_a: Tensor, rows_b: Tensor, tau: float, temperature: float
) -> Terms:
    """Anchors (S, B, d) against bank rows (B, K, d); the image itself is a positive, in the other network's bank."""

    def logits(anchors: Tensor, rows: Tensor) -> Tensor:
        return torch.einsum("sbd,bkd->sbk", anchors, rows) / tau

    everything = torch.ones(rows_a.shape[:2], dtype=torch.bool, device=a.device)
    positives = everything.cumsum(1) <= 2  # own and same class
    own_a, own_b = logits(a, rows_a[:, 1:])[:, None], logits(b, rows_b[:, 1:])[None]
    vcl = _both_ways(own_a, own_b, positives[:, 1:], everything[:, 1:], weight, temperature)
    other_a, other_b = logits(a, rows_b)[:, None], logits(b, rows_a)[None]
    icl = _both_ways(other_a, other_b, positives, everything, weight, temperature)
    return Terms(*vcl, *icl)


def _both_ways(
    first: Tensor,
    second: Tensor,
    positives: Tensor,
    candidates: Tensor,
    weight: Tensor,
    temperature: float,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    hard = contrast(first, positives, candidates, weight, share) + contrast(
        second, positives, candidates, weight, share
    )
    soft = imitation(first, second, weight, temperature) + imitation(second, first, weight, temperature)
    return hard, soft


def contrast(
    logits: Tensor, positives: Tensor, candidates: Tensor, weight: Tensor, share: Tensor | None = None
) -> Tensor:
    """InfoNCE of logits (..., B, K) with masks (B, K) and weights (..., B): mean over positives, then over anchors.

    Positives may be weights too, which sum to 1 at most. Anchors without a positive are left out of the mean, which is
    0 where there is no other. `share`: what the sum over anchors is multiplied by in place of being divided by their
    number.
    """
    # A finite floor: a row without a candidate would otherwise have a gradient that is not a number.
    floor = torch.finfo(logits.dtype).min
    log_p = logits - logits.masked_fill(~candidates, floor).logsumexp(-1, keepdim=True)
    count = positives.sum(-1)
    each = -(log_p * positives).sum(-1) / count.clamp_min(1)
    share = 1 / (count > 0).sum().clamp_min(1) if share is None else share
    return (weight * each).sum() * share


def imitation(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """`losses.kl` of logits (..., B, K), weights (..., B), summed over what leads; all candidates count, own too."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher.detach() / temperature, dim=-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * (weight * each).mean(-1).sum()


class Bank(nn.Module):
    """The last embedding of every training image in each of M networks, and the images that each is compared with.

    With `replacement`, or where the other classes have too few, an image may be drawn more than once for another one.
    `dtype` is what rows are kept in; they are compared and moved in float32 at least. DataError
    without `labels` (N,), or where they are of one class.
    """

    rows: Tensor
    order: Tensor
    starts: Tensor
    counts: Tensor

    def __init__(
        self,
        labels: Tensor | None,
        networks: int,
        width: int,
        negatives: int,
        momentum: float,
        replacement: bool = True,
        dtype: Literal["float32", "float16"] = "float32",
    ) -> None:
        super().__init__()
        if labels is None or len(labels.unique()) < 2:
            given = "none" if labels is None else "one class alone"
            raise DataError(
                f"a memory bank compares each image with others of its class and of other classes, and needs the "
                f"label of every training image; got {given}. Give --data, or do without a bank: --method dml, and of "
                "mcl and lmcl --set method.memory=false."
            )
        self.negatives, self.momentum = negatives, momentum
        spread = 1 / sqrt(width / 3)
        rows = torch.empty(networks, len(labels), width, dtype=getattr(torch, dtype))
        self.register_buffer("rows", rows.uniform_(-spread, spread))
        counts = labels.bincount()
        others = len(labels) - int(counts.max())
        self.replacement = replacement or negatives > others
        self.most = not self.replacement and 2 * negatives > others  # nearly all others are drawn for each image
        self.draws = len(labels) if self.most else negatives if self.replacement else draws_for(negatives, others)
        for name, value in {
            "order": labels.argsort(stable=True), "starts": (counts.cumsum(0) - counts)[labels],
            "counts": counts[labels],
        }.items():  # fmt: skip
            self.register_buffer(name, value, persistent=False)

    def draw_each(self, indices: Tensor) -> tuple[Tensor, ...]:
        """`draw` of images (B,), or of both that each of a mixed batch is of, (B, 2)."""
        return tuple(self.draw(each) for each in (indices[:, None] if indices.dim() == 1 else indices).unbind(1))

    def draw(self, indices: Tensor) -> Tensor:
        """Of each image (B,): itself, one of its class, and `negatives` of other classes, (B, 2 + negatives)."""
        # Each row's key is drawn for the whole batch of all ranks, its many numbers by its own rank alone.
        keys = drawn_together(lambda every: torch.randint(2**62, (len(every),), device=every.device), indices)
        start, count = self.starts[indices, None], self.counts[indices, None]
        others = len(self.order) - count
        chance = uniform(keys, 1 + self.draws)
        alike = self.order[start + (chance[:, :1] * count).long()]
        place = self._places(chance[:, 1:], others)
        # Places are counted over the images of the class itself.
        return torch.cat([indices[:, None], alike, self.order[place + (place >= start) * count]], 1)

    def _places(self, chance: Tensor, others: Tensor) -> Tensor:
        """`negatives` numbers below each of `others` (B, 1)."""
        if self.most:
            beyond = torch.arange(self.draws, device=chance.device) >= others
            return chance.masked_fill(beyond, -1).topk(self.negatives).indices
        place = (chance * others).long()
        if self.replacement:
            return place
        return place.gather(1, doubled(place).sort(dim=1, stable=True).indices[:, : self.negatives])

    def gather(self, drawn: Tensor) -> list[Tensor]:
        """The rows of images (B, K) in each network's bank, M times (B, K, d), in float32 at least."""
        return [rows[drawn].to(torch.promote_types(rows.dtype, torch.float32)) for rows in self.rows]

    def held(self, drawn: Sequence[Tensor], shares: Tensor | None) -> tuple[list[Tensor], Mixed | None]:
        """The rows of what `draw_each` drew, as `mutual_contrast` takes them."""
        rows = [self.gather(each) for each in drawn]
        return rows[0], None if shares is None else Mixed(shares, rows=rows[1])

    @torch.no_grad()
    def update(self, indices: Tensor, embeddings: Sequence[Tensor], shares: Tensor | None = None) -> None:
        """Move the rows of images (B,) towards what M networks now give for them, (B, d) each, at unit length.

        Of mixed images, indices (B, 2) and `shares` (B,) of the first, it moves the row of the one that has more, by as
        much less as the other has of it: not at all where both have half.
        """
        now, more = gather(torch.stack(list(embeddings)), 1), None
        if shares is not None:
            indices = torch.where(shares < 0.5, indices[:, 1], indices[:, 0])
            more = gather((2 * shares - 1).abs().to(now))
        indices = gather(indices)
        # An image that stands in a batch twice leaves its last embedding, in whatever order a device writes.
        last = (torch.arange(len(indices), device=indices.device) * (indices[:, None] == indices)).amax(1)
        kept = self.momentum if more is None else 1 - (1 - self.momentum) * more[last, None]
        for rows, new in zip(self.rows, now, strict=True):
            old = rows[indices].to(new.dtype)
            moved = F.normalize(kept * old + (1 - kept) * new[last])
            rows[indices] = torch.where(moved.isfinite().all(1, keepdim=True), moved, old).to(rows.dtype)


def doubled(numbers: Tensor) -> Tensor:
    """Which of the numbers (B, n) stands further to the left in its row already, as 0 and 1."""
    ordered, at = numbers.sort(dim=1, stable=True)
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0)).to(torch.uint8)
    return torch.empty_like(again).scatter(1, at, again)


def draws_for(distinct: int, population: int) -> int:
    """How many draws from a population give so many distinct ones; that they do not has a chance below 1e-12."""
    expected = -population * log1p(-distinct / population)
    return ceil(expected + 10 * sqrt(max(0, expected - distinct)) + 16)
