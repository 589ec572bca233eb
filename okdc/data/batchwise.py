"""The loader's augmentation of single images, done to a whole batch of decoded ones at once, on any device.

The law is the loader's: the same crops and flips with the same probabilities, and of each the same pixels. Only where a
crop is made smaller downwards by far more than across does Pillow, since version 13, go down first, which changes how
pixels are rounded. The random numbers are f(seed, epoch, image), but other ones than the loader's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from okdc.system.randomness import uniform

ATTEMPTS = 10  # of timm to find a crop that fits, before it takes the middle
FILTERS = ("bilinear", "bicubic")  # of Pillow
ONE = 2**22  # Pillow's weights are whole numbers of this part, so that sums are exact in float64, in whatever order
DRAWS = 4 + 4 * ATTEMPTS


@dataclass(frozen=True)
class Law:
    """What is drawn for each image: a crop after padding, or a resized crop, or none; then flips."""

    size: tuple[int, int]  # of what comes out, H and W
    padding: int | None = None
    scale: tuple[float, float] | None = None  # with `ratio`: of a resized crop
    ratio: tuple[float, float] = (1.0, 1.0)
    interpolation: str = "bilinear"
    hflip: float = 0.0
    vflip: float = 0.0

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """uint8 images (B, C, h, w) and a key (B,) int64 for the random numbers of each: uint8 (B, C, H, W)."""
        draws = uniform(keys, DRAWS if self.scale else 4)
        if self.padding is not None:
            images = padded_crop(images, draws[:, 2], draws[:, 3], self.size, self.padding)
        elif self.scale:
            boxes = crop_boxes(draws[:, 4:], images.shape[-2], images.shape[-1], self.scale, self.ratio)
            images = resized_crop(images, boxes, self.size, self.interpolation)
        images = _flip(images, draws[:, 0] < self.hflip, -1) if self.hflip else images
        return _flip(images, draws[:, 1] < self.vflip, -2) if self.vflip else images


def _flip(images: Tensor, which: Tensor, dimension: int) -> Tensor:
    return torch.where(which[:, None, None, None], images.flip(dimension), images)


def padded_crop(images: Tensor, down: Tensor, right: Tensor, size: tuple[int, int], padding: int) -> Tensor:
    """torchvision's RandomCrop with black padding: images (B, C, h, w), places `down` and `right` (B,) in [0, 1)."""
    images = F.pad(images, (padding,) * 4)
    (height, width), (rows, columns) = images.shape[-2:], size
    top = (down * (height - rows + 1)).long()[:, None] + torch.arange(rows, device=images.device)
    left = (right * (width - columns + 1)).long()[:, None] + torch.arange(columns, device=images.device)
    pixels = (top[:, :, None] * width + left[:, None, :]).flatten(1)[:, None]
    return images.flatten(2).gather(2, pixels.expand(-1, images.shape[1], -1)).unflatten(2, size)


def crop_boxes(
    draws: Tensor, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, ...]:
    """Top, left, height and width (B,) of timm's random resized crop, from draws (B, 4 * ATTEMPTS)."""
    area, aspect, down, right = draws.unflatten(1, (4, ATTEMPTS)).unbind(1)
    area = (scale[0] + area * (scale[1] - scale[0])) * height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + aspect * (high - low))
    wide, tall = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    top, left = (down * (height - tall + 1)).long(), (right * (width - wide + 1)).long()
    fits = (wide <= width) & (tall <= height)
    first = fits.int().argmax(1, keepdim=True)
    shape = width / height
    full_width = width if shape <= max(ratio) else round(height * max(ratio))
    full_height = height if shape >= min(ratio) else round(width / min(ratio))
    middle = ((height - full_height) // 2, (width - full_width) // 2, full_height, full_width)
    none = ~fits.any(1)
    return tuple(
        torch.where(none, otherwise, drawn.gather(1, first)[:, 0])
        for drawn, otherwise in zip((top, left, tall, wide), middle, strict=True)
    )


def resized_crop(images: Tensor, boxes: tuple[Tensor, ...], size: tuple[int, int], interpolation: str) -> Tensor:
    """Pillow's resize of a box of each image (B, C, h, w): across first, then down, rounded to levels each time."""
    top, left, tall, wide = boxes
    channels, height, width = images.shape[1:]
    across = _weights(left, wide, width, size[1], interpolation)
    down = _weights(top, tall, height, size[0], interpolation)
    # Rows of all channels beside one another, so that an image takes one product each way.
    rows = images.transpose(1, 2).flatten(1, 2).double()
    rows = _levels(torch.bmm(rows, across.mT)).view(-1, height, channels * size[1])
    pixels = _levels(torch.bmm(down, rows)).to(torch.uint8)
    return pixels.unflatten(2, (channels, size[1])).transpose(1, 2).contiguous()


def _levels(x: Tensor) -> Tensor:
    return x.add_(0.5).floor_().clamp_(0, 255)


def _weights(start: Tensor, length: Tensor, inputs: int, outputs: int, interpolation: str) -> Tensor:
    """How much of each of `inputs` pixels is in each of `outputs`: (B, outputs, inputs), for boxes given by (B,)."""
    scale = (length.double() / outputs)[:, None, None]
    stretch = scale.clamp_min(1)  # where there are fewer pixels than before, each takes in more of them
    centre = (torch.arange(outputs, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(inputs, device=start.device) - start[:, None, None]
    inside = (pixel >= 0) & (pixel < length[:, None, None])
    weights = _filter((pixel - centre).add_(0.5).div_(stretch).abs_(), interpolation).mul_(inside)
    total = weights.sum(-1, keepdim=True)
    return weights.mul_(ONE).div_(total).round_().div_(ONE)


def _filter(x: Tensor, interpolation: str) -> Tensor:
    """What a pixel counts by its distance from the centre; none where that is beyond 1, or 2."""
    if interpolation == "bilinear":
        return (1 - x).clamp_min_(0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))
