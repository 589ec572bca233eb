"""Small networks whose stages, blocks or classifier are built in an unusual way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.networks import Inverted, Tiny, Tokens, conv


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
