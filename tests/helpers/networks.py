"""Small hand-written networks that each show one trap of sharing a trunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Tiny(nn.Module):
    """Three stages and a linear classifier; no block keeps its shape, so growth uses okdc's own."""

    def __init__(self, classes: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.early = conv(width, 2 * width, 2)
        self.late = conv(2 * width, 4 * width, 2)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(self.stem(x))).mean((2, 3)))


class Inverted(nn.Module):
    """MobileNet's block: widen, one filter per channel, narrow; added to its input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        inner = 2 * inputs
        self.widen = nn.Conv2d(inputs, inner, 1, bias=False)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.narrow = nn.Conv2d(inner, outputs, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (inner, inner, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norms[0](self.widen(x)))
        y = self.norms[2](self.narrow(F.relu6(self.norms[1](self.depthwise(y)))))
        return x + y if x.shape == y.shape else y


class Depthwise(nn.Module):
    """A small MobileNet: stages of inverted residual blocks, the last of which could be repeated."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = conv(3, 8, 2)
        self.early = nn.Sequential(Inverted(8, 16, 2), Inverted(16, 16))
        self.late = nn.Sequential(Inverted(16, 24, 2), Inverted(24, 24))
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(self.stem(x))).mean((2, 3)))


class Gated(nn.Module):
    """Its classifier is registered first; what is registered last gives as many numbers, which open four groups."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(16, num_classes)
        self.stem, self.late = conv(3, 8), conv(8, 16, 2)
        self.gate = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.stem(x)).mean((2, 3))
        return self.head(x * self.gate(x).sigmoid().repeat_interleave(4, dim=1))


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


class Tokens(nn.Module):
    """A small ViT: class token, position embedding, equal blocks."""

    def __init__(self, classes: int = 4, depth: int = 6, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Streams(nn.Module):
    """Two streams of different shapes in, the same two out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.coarse = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        fine = fine + self.fine(fine)
        return fine, coarse + self.coarse(coarse) + fine.mean(1, keepdim=True)


class TwoStreams(nn.Module):
    """Blocks that pass on two streams of tokens, as a transformer within a transformer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.pairs = nn.ModuleList(Streams(width) for _ in range(6))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        fine, coarse = x.flatten(2).transpose(1, 2), F.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        for pair in self.pairs:
            fine, coarse = pair(fine, coarse)
        return self.head(self.norm(coarse).mean(1))


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


class Window(nn.Module):
    """A residual block whose setting takes turns, as windows that are shifted in every second block."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.mix = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.roll(self.shift, 2))


class Alternating(Tiny):
    """The last stage is a ModuleList that the forward iterates; its blocks take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = nn.ModuleList(Window(32, i % 2) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.early(self.stem(x)))
        for window in self.windows:
            x = window(x)
        return self.head(x.mean((2, 3)))


class Strided(nn.Module):
    """A residual block that halves the map, and so cannot be repeated as it is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.body = conv(inputs, outputs, 2)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(x)) + self.shortcut(x)


class OneStrided(Tiny):
    """Stages of one strided block each, as resnet10t's."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = Strided(8, 16), Strided(16, 32)  # type: ignore[assignment]


class DenseLayer(nn.Module):
    """Reads all that came before it in its stage, and gives a few channels more."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4, 3, padding=1)

    def forward(self, features: list[Tensor] | Tensor) -> Tensor:
        x = torch.cat(features, 1) if isinstance(features, list) else features
        return F.relu(self.conv(x))


class DenseStage(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs + 4 * i) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class Dense(Tiny):
    """Channels grow from layer to layer, as DenseNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Sequential(nn.AvgPool2d(2), DenseStage(16))


class LinearAsConvolution(Tiny):
    """Its classifier begins with a convolution as large as the map, as timm's VGG."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv2d(32, 64, 8)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.early(self.stem(x)))
        return self.head(F.relu(self.dense(x)).flatten(1))


class LateClassToken(Tokens):
    """The class token joins the patches after most of the blocks, as CaiT's: one position more is no new stage."""

    def __init__(self) -> None:
        super().__init__(depth=30)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position[:, 1:]
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.head(self.norm(x)[:, 0])


class PooledKeys(nn.Module):
    """Attends to a smaller copy of the map inside a block, which is no new stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pool = nn.Conv2d(width, width, 4, 4)
        self.mix = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x) * self.pool(x).mean((2, 3), keepdim=True)


class SideBranch(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.keys = PooledKeys(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(self.keys(self.stem(x)))).mean((2, 3)))


class Convolutional(Tiny):
    """Its classifier is a convolution, and what it says is averaged, as SqueezeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(32, 4, 1)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(self.stem(x)))).mean((2, 3))


class ConvNormAct(nn.Module):
    """A convolution, norm and activation in a module of their own, by a name that ends like a part's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Plain(nn.Module):
    """A VGG of such units, each group of them pooled."""

    def __init__(self) -> None:
        super().__init__()
        groups = [(ConvNormAct(i, o), ConvNormAct(o, o), nn.MaxPool2d(2)) for i, o in ((3, 4), (4, 6), (6, 8), (8, 10))]
        self.groups = nn.Sequential(*(nn.Sequential(*group) for group in groups))
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.groups(x).mean((2, 3)))


class Wrapped(nn.Module):
    """Adds what a layer gives to what it takes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class MixerBlock(nn.Module):
    """Two residual parts of one kind, which do not do the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.space = Wrapped(nn.Conv2d(width, width, 3, 1, 1, groups=width))
        self.channels = Wrapped(nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(self.space(x))


class OfWrapped(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Sequential(conv(16, 32, 2), MixerBlock(32), MixerBlock(32))


class WrittenOut(Tiny):
    """Blocks that are plain Sequentials of a residual part and a convolution, as ConvMixer's."""

    def __init__(self) -> None:
        super().__init__()
        space = [Wrapped(nn.Conv2d(32, 32, 3, 1, 1, groups=32)) for _ in range(2)]
        self.late = nn.Sequential(conv(16, 32, 2), *(nn.Sequential(part, nn.Conv2d(32, 32, 1)) for part in space))


class DeepStem(Tiny):
    """A stem of several convolutions, some of which keep their input's shape, before stages of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 2), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())
        self.early = nn.Sequential(Inverted(8, 16, 2), Inverted(16, 16), Inverted(16, 16))
        self.late = nn.Sequential(Inverted(16, 32, 2), Inverted(32, 32))


class TwoOutputs(Tiny):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits, logits


class MoreInTraining(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits  # type: ignore[return-value]


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
