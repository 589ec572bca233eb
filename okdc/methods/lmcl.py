"""Trains whole networks whose stages learn from each other's embeddings; learned weights say which stage from which.

Use it when you have time and memory, and care for good embeddings as well as for accuracy. It pulls embeddings of
images of one class together, at every stage.

Paper: C. Yang, Z. An, H. Zhou, F. Zhuang, Y. Xu, Q. Zhang, Online Knowledge Distillation via Mutual Contrastive
    Learning for Visual Recognition, TPAMI 2023 (document 10073628), arXiv 2207.11518.
Code: winycg/L-MCL was read, and not copied: its losses, aggregator, weight network and meta-optimizer.
Differs: The hyper-gradient is exact; the code's recursion has lost a factor (the weight decay). The running statistics
    of batch norm do not see the look-ahead. With memory=true each network is contrasted with its own bank; the code
    takes the first network's for both. Your network's own end is judged and ships, never a branch. A network of one
    stage (a ViT) is tapped after each third of its blocks. Peers may differ in widths and in their number of stages.
    --mixup and --cutmix, which the authors do without, act on the contrast as in mcl (okdc methods mcl).
Costs: One whole network more. Each network has a branch after every stage but the last, which is about twice its FLOPs
    on CIFAR. Every 50th step takes the time of thirteen others and three times their memory (measured with ResNet-20).
    memory=true keeps an embedding of every training image for each network, width x 4 bytes; bank_dtype=float16 halves
    that: numbers are rounded to 11 bits, and still compared in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

from okdc.cohort import Cohort, Cost
from okdc.errors import NetworkError, RecipeError, first_line
from okdc.losses import cross_entropy
from okdc.methods.shared.base import Method
from okdc.methods.shared.contrast import Bank, mutual_contrast
from okdc.methods.shared.lookahead import descend, hypergradient
from okdc.methods.shared.mixing import Mixed, of_classes
from okdc.methods.shared.towers import Aggregator, Matching, Taps, Towers
from okdc.needs import Needs
from okdc.system.randomness import random_state, set_random_state


class Told(NamedTuple):
    """What a batch is held against: images drawn from the bank, each (B, 2 + K), and of what it is mixed."""

    drawn: tuple[Tensor, ...]
    mixed: Mixed | None


class Lmcl(Method):
    """Layer-wise Mutual Contrastive Learning between whole networks; the target, member 0, ships."""

    share = "none"
    second_order = True

    matching_momentum: Tensor
    train_labels: Tensor | None

    def __init__(
        self,
        cohort: Cohort,
        *,
        branch_depth: Literal["full", "first_block"] = "full",
        memory: bool = False,
        vcl: float = 0.1,
        soft_vcl: float = 1.0,
        icl: float = 0.1,
        soft_icl: float = 1.0,
        tau: float = 0.1,
        temperature: float = 3.0,
        width: int = 128,
        negatives: int = 8192,
        memory_momentum: float = 0.5,
        bank_dtype: Literal["float32", "float16"] = "float32",
        meta_every: int = 50,
        meta_steps: int = 2,
        meta_momentum: float = 0.9,
        meta_weight_decay: float = 5e-4,
        detach_weight_inputs: bool = False,
        train_labels: Tensor | None = None,
    ) -> None:
        super().__init__(cohort)
        if cohort.cut is not None or min(meta_every, width) < 1:
            wrong = "members that share a trunk" if cohort.cut else f"meta_every={meta_every} and width={width}"
            raise RecipeError(f"lmcl got {wrong}; expected whole networks (--share none), and numbers above 0.")
        self.weights = {"vcl": vcl, "soft_vcl": soft_vcl, "icl": icl, "soft_icl": soft_icl}
        self.tau = tau
        self.temperature = temperature
        self.meta_every = meta_every
        self.meta_steps = meta_steps
        self.meta_sgd = {"momentum": meta_momentum, "weight_decay": meta_weight_decay}
        self.detach_weight_inputs = detach_weight_inputs
        self.bank = None
        if memory:
            self.bank = Bank(train_labels, len(cohort), width, negatives, memory_momentum, dtype=bank_dtype)
        self.register_buffer("train_labels", train_labels, persistent=False)
        self.towers = Towers(cohort, width, branch_depth == "first_block")
        try:
            self.aggregators = nn.ModuleList(Aggregator(widths) for widths in self.towers.widths)
            self.matching = Matching(self.towers.widths).requires_grad_(False)  # the networks' optimizer lets it be
            momentum = torch.zeros_like(parameters_to_vector(self.matching.parameters()))
            self.register_buffer("matching_momentum", momentum)
            self._counted = (-1, 0)  # the epoch, and the steps that were taken in it
            self._epoch_version = -1
            self._try_meta_step()
        except BaseException:
            self.strip()
            raise

    def forward(
        self, images: Tensor, labels: Tensor, indices: Tensor | None = None, shares: Tensor | None = None
    ) -> dict[str, Tensor]:
        taps = self.towers(images)
        parts = self.layered_losses(taps, labels, *self._held(self._told(indices, shares)))
        if self.bank is not None and self.training:
            assert indices is not None
            self.bank.update(indices, [network.embeddings[-1] for network in taps], shares)
        return parts

    def layered_losses(
        self, taps: list[Taps], labels: Tensor, rows: list[Tensor] | None = None, mixed: Mixed | None = None
    ) -> dict[str, Tensor]:
        """Spec section 4 on what the networks said; `rows` of the banks and `mixed` as `mutual_contrast` takes them."""
        parts, names = {}, self.cohort.names
        aggregated = [a(x.logits, x.features) for a, x in zip(self.aggregators, taps, strict=True)]
        for name, network, together in zip(names, taps, aggregated, strict=True):
            parts[f"ce/{name}"] = self._labelled(network, labels)
            parts[f"ce/{name}_mixed"] = cross_entropy(together, labels)
            taught = [
                self.task.distance(network.logits[-1], teacher, labels, self.temperature) for teacher in aggregated
            ]
            parts[f"kd/{name}"] = torch.stack(taught).sum()
        with torch.no_grad():
            matched = self.matching([network.features for network in taps])
        return parts | self._contrast(taps, labels, matched, rows, mixed)

    def _labelled(self, network: Taps, labels: Tensor) -> Tensor:
        return torch.stack([cross_entropy(z, labels) for z in network.logits]).sum()

    def _contrast(
        self,
        taps: list[Taps],
        labels: Tensor,
        matched: dict[tuple[int, int], Tensor],
        rows: list[Tensor] | None,
        mixed: Mixed | None,
    ) -> dict[str, Tensor]:
        """The weighted terms; the sum over ordered pairs of networks has each pair twice, with the same weight."""
        embeddings, twice = [network.embeddings for network in taps], {pair: 2 * w for pair, w in matched.items()}
        terms = mutual_contrast(
            embeddings, labels, rows, twice, tau=self.tau, temperature=self.temperature, mixed=mixed
        )
        return {name: weight * getattr(terms, name) for name, weight in self.weights.items()}

    def _told(self, indices: Tensor | None = None, shares: Tensor | None = None) -> Told:
        """What stays the same of a batch while the networks look ahead."""
        if self.bank is None:
            return Told((), of_classes(self.train_labels, indices, shares))
        assert indices is not None  # `needs` asked for them
        return Told(self.bank.draw_each(indices), None if shares is None else Mixed(shares))

    def _held(self, told: Told) -> tuple[list[Tensor] | None, Mixed | None]:
        if self.bank is None:
            return None, told.mixed
        return self.bank.held(told.drawn, told.mixed and told.mixed.shares)

    def after_step(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """At steps 0, meta_every, 2 meta_every .. of an epoch, move the matching by the batches' hyper-gradient."""
        if self.epoch._version != self._epoch_version:  # the device is asked for the epoch only when that was written
            self._epoch_version = self.epoch._version
            if self._counted[0] != int(self.epoch):
                self._counted = int(self.epoch), 0
        epoch, step = self._counted
        self._counted = epoch, step + 1
        if step % self.meta_every == 0:
            found = self.meta_gradient(list(batches))
            descend(list(self.matching.parameters()), found, self.matching_momentum, self.lr, **self.meta_sgd)

    def meta_gradient(self, batches: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        """What the labels say of the matching: d CE / d each of its parameters, a few steps ahead of here.

        Networks and heads first take `meta_steps` steps on the contrast alone and one on the labels, each on all of
        `batches` (images, labels, and indices where there are banks), weighted by size as in training.
        They do so as tensors on the side: parameters, buffers and random numbers are afterwards what they were.
        """
        moving = {name: p.detach() for name, p in self.towers.named_parameters() if p.requires_grad}
        buffers = {name: b.clone() for name, b in self.towers.named_buffers()}
        asked = dict(self.matching.named_parameters())
        state = random_state()

        def taps(theta: list[Tensor], images: Tensor) -> list[Taps]:
            return functional_call(self.towers, dict(zip(moving, theta, strict=True)) | buffers, (images,))

        def contrast(
            theta: list[Tensor], phi: list[Tensor], images: Tensor, labels: Tensor, told: Told, share: float
        ) -> Tensor:
            seen = taps(theta, images)
            features = [x.features.detach() if self.detach_weight_inputs else x.features for x in seen]
            matched = functional_call(self.matching, dict(zip(asked, phi, strict=True)), (features,))
            terms = self._contrast(seen, labels, matched, *self._held(told))
            return share * torch.stack(list(terms.values())).sum()

        def labelled(
            theta: list[Tensor], phi: list[Tensor], images: Tensor, labels: Tensor, told: Told, share: float
        ) -> Tensor:
            return share * torch.stack([self._labelled(network, labels) for network in taps(theta, images)]).sum()

        try:
            parts, device = self._parts(batches), batches[0][0].device.type
            # Fused attention can be differentiated once, and two derivatives of bfloat16 are noise.
            with sdpa_kernel(SDPBackend.MATH), torch.autocast(device, enabled=False), torch.enable_grad():
                return hypergradient(
                    [contrast] * self.meta_steps + [labelled], labelled, list(moving.values()), list(asked.values()),
                    parts, lr=self.lr, **self.meta_sgd,
                )  # fmt: skip
        finally:
            set_random_state(state)

    def _parts(self, batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, Tensor, Told, float]]:
        """Of each batch images, labels, what else it is held against, and its share of all images."""
        total = sum(len(labels) for _, labels, *_ in batches)
        return [(images, labels, self._told(*rest), len(labels) / total) for images, labels, *rest in batches]

    def _try_meta_step(self) -> None:
        """NetworkError, before training, where a network's operations cannot be differentiated twice."""
        images = torch.randn(2, *self.cohort.anatomy.input_size).to(next(self.cohort.target.parameters()))
        self.to(images.device)
        pair = torch.zeros(2, dtype=torch.long, device=images.device)
        try:
            self.meta_gradient([(images, pair, pair)])
        except RuntimeError as error:
            refused = f"lmcl needs second derivatives of its networks: {first_line(error)}"
            raise NetworkError(f"{refused}. Choose --method mcl, which does not.") from error

    def costs(self) -> tuple[Cost, ...]:
        return (*self.cohort.costs, *self.towers.costs(self.cohort.names))

    @classmethod
    def cost(cls) -> str:
        return f"{super().cost()}, a branch after each stage"

    def strip(self) -> nn.Module:
        self.towers.strip()
        return super().strip()

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._counted)

    def set_extra_state(self, state: Tensor) -> None:
        self._counted = int(state[0]), int(state[1])

    @classmethod
    def needs(cls, *, memory: bool = False, **settings: Any) -> Needs:
        return Needs(indices=True, mixed=True) if memory else Needs(pairs=True, mixed=True)
