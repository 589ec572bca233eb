"""Small networks that each show one trap of sharing a trunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.networks import Tiny, conv


class ControlFlow(Tiny):
    """Functional dropout before and after the cut, a skip across it, a loop and a branch in Python."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.stem(x), 0.2, self.training)
        early = self.early(x)
        for _ in range(2):
            early = early * 0.9 + 0.1
        late = self.late(early)
        if self.training:
            late = F.dropout2d(late, 0.3)
        pooled = late.mean((2, 3))
        pooled[:, : early.shape[1]] = pooled[:, : early.shape[1]] + early.amax((2, 3))
        return self.head(pooled)


class ChangesInPlace(Tiny):
    """The tail writes into what the trunk returned: siblings must not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.early = self.early[:2]  # autograd would refuse to see the output of a ReLU changed

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(self.stem(x))
        early += 1.0
        early.mul_(0.5)
        return self.head(self.late(early).mean((2, 3)))


class CalledTwice(Tiny):
    """One activation module serves the trunk and the tail; the stem's norm is called twice before the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = self.early[:2], self.late[:2]
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.norm(self.stem(x))))
        return self.head(self.act(self.late(self.act(self.early(x)))).mean((2, 3)))


class Pair(nn.Module):
    """Returns a tuple and takes one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = conv(width, width), conv(width, width)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.one(pair[0]), self.two(pair[1]) + pair[0]


class Tuples(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(x))
        one, two = self.pair((x, x + 1))
        return self.head(self.late(one + two).mean((2, 3)))


class ReadsAttribute(Tiny):
    """The tail asks a trunk module for its settings and for one of its parts."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(x))
        scale = self.stem[0].kernel_size[0] * len(self.stem)
        return self.head(self.late(x / scale).mean((2, 3)))


class Lists(Tiny):
    """Modules that take a list and change it, as HRNet's; the cut may be between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = InList(16), InList(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(x))
        maps = self.two(self.one([x, x + 1]))
        return self.head(self.late(maps[0] + maps[1]).mean((2, 3)))


class InList(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(conv(width, width) for _ in range(2))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        for i, part in enumerate(self.parts):
            maps[i] = part(maps[i])
        return [maps[0], maps[1] + maps[0]]


class Counting(Tiny):
    """Keeps a moving average in a buffer that its forward updates, before and after the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("centre", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(x))
        if self.training:
            self.seen += 1
            self.centre.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return self.head(self.late(x - self.centre.view(1, -1, 1, 1)).mean((2, 3)))


class Growing(Tiny):
    """Makes a layer anew in each forward, which its modules do not show."""

    def forward(self, x: Tensor) -> Tensor:
        mixed = nn.Conv2d(32, 32, 1).to(x.device)(self.late(self.early(self.stem(x))))
        return self.head(mixed.mean((2, 3)))


class ByData(Tiny):
    """Takes another way through its modules for other images, and so for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark = conv(32, 32), conv(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        way = self.bright if x.mean() > 0 else self.dark
        return self.head(way(self.late(self.early(self.stem(x)))).mean((2, 3)))


class ScaledByData(Tiny):
    """What the tail does depends on an output of the trunk that is no part of the sum."""

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        early = self.early(stem)
        return self.head(self.late(early * 2 if stem.mean() > 0.6 else early).mean((2, 3)))


class LeftOut(Tiny):
    """In training mode a module before or after the cut is left out at random, as whole blocks of stochastic depth."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.one, self.two = conv(16, 16), conv(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        left_out = self.training and torch.rand(()) < 0.5
        x = self.early(self.stem(x))
        x = x if left_out and self.where == "trunk" else self.one(x)
        x = self.late(x)
        return self.head((x if left_out and self.where == "tail" else self.two(x)).mean((2, 3)))


class SharedAcross(Tiny):
    """One convolution serves twice, before and after the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(16, 16, 3, padding=1)
        self.middle = conv(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.twice(self.early(self.stem(x))))
        return self.head(self.late(self.twice(x)).mean((2, 3)))


class OtherOrder(Tiny):
    """In training mode two modules change places, so that the cut's trunk is another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(16, 16), conv(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(x))
        x = self.two(self.one(x)) if not self.training else self.one(self.two(x))
        return self.head(self.late(x).mean((2, 3)))


class SkippedInTraining(OtherOrder):
    """A module of the trunk is left out in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.stem(x))
        x = x if self.training else self.one(x)
        return self.head(self.late(self.two(x)).mean((2, 3)))


class CalledMoreInTraining(OtherOrder):
    """A module of the tail calls a module of the trunk once more in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(self.early(self.stem(x))))
        x = self.one(x) if self.training else x
        return self.head(self.late(x).mean((2, 3)))
