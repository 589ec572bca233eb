"""Small hand-written networks, one of each usual kind."""

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


class TwoOutputs(Tiny):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits, logits


class MoreInTraining(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits  # type: ignore[return-value]
