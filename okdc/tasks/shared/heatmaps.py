"""Heat maps of key points: points become maps and maps points, and how two maps differ. B batch, K key points, h w map.

Points are (B, K, 3): x and y in pixels of the network's input, the middle of the first pixel being 0, and a weight: 1
where a point is labelled, 0 where not. A map's pixel u is at input pixel x = (u + 0.5) * stride - 0.5, so that maps of
any size lie on the image without an offset and a mirrored image has mirrored maps. Encoding `exact` keeps the centres
as they are and decodes by the parabola through the logarithms around the peak, which is exact for a Gaussian. Encoding
`official` is that of Simple Baselines and OKDHP (Xiao et al. 2018, Li et al. 2021): x = u * stride, centres rounded to
pixels, maps cut at 3 sigma, and a quarter of a pixel towards the larger neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Encoding = Literal["exact", "official"]
Reduction = Literal["mean", "official"]
Stride = float | tuple[float, float]  # input pixels per pixel of the map; of height and width where they differ

REACH = 3.0  # in sigmas: further off a point leaves nothing on the map


def stride_of(input_size: Sequence[int], size: Sequence[int]) -> tuple[float, float]:
    """Input pixels per pixel of the map, of height and width.

    >>> stride_of((96, 64), (24, 16))
    (4.0, 4.0)
    """
    return input_size[0] / size[0], input_size[1] / size[1]


def sigma_for(size: Sequence[int]) -> float:
    """How wide a Gaussian is on a map of `size` (h, w), in its pixels: 1.5, and more on maps of more than 48.

    On maps of 64 and 96 it is the 2 and 3 that pose networks are customarily trained with.

    >>> sigma_for((24, 24)), sigma_for((64, 48)), sigma_for((96, 72))
    (1.5, 2.0, 3.0)
    """
    return max(1.5, max(size) / 32)


def centres(points: Tensor, stride: Stride, encoding: Encoding = "exact") -> Tensor:
    """Where points (..., 2 or more) are on the map, x and y (..., 2); rounded to pixels in the official encoding."""
    scale = _scale(stride, points)
    if encoding == "official":
        return (points[..., :2] / scale + 0.5).trunc()
    return (points[..., :2] + 0.5) / scale - 0.5


def weights(
    points: Tensor, size: Sequence[int], stride: Stride, sigma: float = 2.0, encoding: Encoding = "exact"
) -> Tensor:
    """Weights (B, K) of points (B, K, 3): their own, but 0 for one so far outside that nothing of it is on the map."""
    at = centres(points, stride, encoding)
    last = at.new_tensor([size[1] - 1, size[0] - 1])
    reaches = ((at >= -REACH * sigma) & (at <= last + REACH * sigma)).all(-1)
    return torch.where(reaches, points[..., 2], 0.0)


def render(
    points: Tensor, size: Sequence[int], stride: Stride, sigma: float = 2.0, encoding: Encoding = "exact"
) -> Tensor:
    """Gaussians (B, K, h, w) with peak 1 around points (B, K, 2 or more); `size` (h, w) and `sigma` in map pixels.

    >>> render(torch.tensor([[[5.5, 1.5, 1.0]]]), (1, 3), 4.0, sigma=1.0)  # between two pixels there is no 1
    tensor([[[[0.6065, 1.0000, 0.6065]]]])
    """
    at = centres(points, stride, encoding)
    columns, rows = (_bump(at[..., axis], length, sigma, encoding) for axis, length in ((0, size[1]), (1, size[0])))
    return rows[..., :, None] * columns[..., None, :]


def _bump(centre: Tensor, length: int, sigma: float, encoding: Encoding) -> Tensor:
    off = torch.arange(length, device=centre.device, dtype=centre.dtype) - centre[..., None]
    value = torch.exp(-(off**2) / (2 * sigma**2))
    return value * (off.abs() <= REACH * sigma) if encoding == "official" else value


def decode(maps: Tensor, stride: Stride, encoding: Encoding = "exact") -> Tensor:
    """Points (B, K, 3) of maps (B, K, h, w): x and y in input pixels, and the height of the peak as their score.

    In the official encoding a map without a positive value gives the point 0, 0.

    >>> points = torch.tensor([[[17.2, 30.9, 1.0]]])
    >>> decode(render(points, (16, 12), 4.0), 4.0)[..., :2]
    tensor([[[17.2000, 30.9000]]])
    """
    maps = _full(maps)
    score, place = maps.flatten(2).max(-1)
    peak = torch.stack([place % maps.shape[3], place // maps.shape[3]], -1)
    shift = torch.stack([_shift(maps, peak, axis, encoding) for axis in (0, 1)], -1)
    scale = _scale(stride, maps)
    if encoding == "official":
        xy = (peak + shift) * scale * (score > 0)[..., None]
    else:
        xy = (peak + shift + 0.5) * scale - 0.5
    return torch.cat([xy, score[..., None]], -1)


def _shift(maps: Tensor, peak: Tensor, axis: int, encoding: Encoding) -> Tensor:
    """How far beside the highest pixel (B, K, 2) the maximum is along x (0) or y (1), in pixels; 0 at the border."""
    height, width = maps.shape[2:]
    length, step = (width, 1) if axis == 0 else (height, width)
    flat, place = maps.flatten(2), peak[..., 1] * width + peak[..., 0]
    # In the official form pixels beside the border count as the border, of both axes.
    margin = 2 if encoding == "official" else 1
    inside = (peak[..., axis] >= margin) & (peak[..., axis] < length - 1)
    before, at, after = (
        flat.gather(2, torch.where(inside, place + d * step, place)[..., None])[..., 0] for d in (-1, 0, 1)
    )
    if encoding == "official":
        other = peak[..., 1 - axis]
        inside = inside & (other >= margin) & (other < (height, width)[axis] - 1)
        return torch.where(inside, 0.25 * torch.sign(after - before), 0.0)
    # No less than a thousandth of the peak: what is lower is noise, and its logarithm would decide.
    floor = (1e-3 * at).clamp_min(torch.finfo(maps.dtype).tiny)
    low, top, high = (value.maximum(floor).log() for value in (before, at, after))
    bend = low - 2 * top + high
    found = 0.5 * (low - high) / torch.where(bend < 0, bend, -1.0)
    return torch.where(inside & (at > 0) & (bend < 0), found.clamp(-0.5, 0.5), 0.0)


def mse(maps: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Half the squared difference of maps and targets (B, K, h, w), the mean over images, key points and pixels.

    What has no weight (B, K) counts as equal, and is counted: parts of a batch add up to the whole, and a batch without
    a labelled point is 0.
    """
    maps, targets, weights = _full(maps), _full(targets), _full(weights)
    return 0.5 * (weights[..., None, None] * (maps - targets)).square().mean()


def kl(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
    *,
    reduction: Reduction = "mean",
    detach: bool = True,
) -> Tensor:
    """KL(teacher || student) of maps (B, K, h, w), each a distribution over its pixels, times T^2; weights (B, K).

    `mean` is over the labelled points of an image, then over images: nats per point. `official` sums points and divides
    by images and by pixels, as OKDHP's code: `mean` times labelled points, through pixels. The teacher is a constant
    unless `detach` is False.
    """
    student, teacher = _full(student), _full(teacher.detach() if detach else teacher)
    weights = _full(weights)
    # Of a map without weight both are uniform, and no gradient comes of it.
    log_q, log_p = (F.log_softmax((weights[..., None] * x.flatten(2)) / temperature, -1) for x in (student, teacher))
    each = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    if reduction == "official":
        return each.sum() / (len(each) * student.shape[2:].numel())
    return (each.sum(1) / weights.sum(1).clamp_min(1)).mean()


def _scale(stride: Stride, like: Tensor) -> Tensor:
    """The stride as x and y, (2,)."""
    down, across = stride if isinstance(stride, tuple) else (stride, stride)
    return torch.tensor([across, down], device=like.device, dtype=_full(like[:0]).dtype)


def _full(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
