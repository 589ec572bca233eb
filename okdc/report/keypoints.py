"""Key points on validation images in the report: where the student has them, and where they are labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from okdc.report.examples import picture, unnormalised

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SIDE = 320  # pixels of the longer side of a picture
_DOT = 4  # radius, pixels
HUES = ("#e6443c", "#2f7ed8", "#2ca05a", "#e8a317", "#8e5bc0", "#17b3b3")  # of key points, in turns


def pictured(
    images: Tensor, predicted: Tensor, true: Tensor, skeleton: Sequence[Sequence[int]], preprocess: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Inputs of a network (B, C, H, W) with points (B, K, 3 or more) on them, as plain values of the fact `pictured`.

    Points are x and y in pixels of the input and a weight, which counts in the true ones: 0 where there is no label.
    `skeleton` is the pairs of points that a line connects.
    """
    rows = []
    for image, ours, theirs in zip(images, predicted.double().cpu(), true.double().cpu(), strict=True):
        there = theirs[:, 2] > 0
        off = (ours[there, :2] - theirs[there, :2]).norm(dim=1)
        shown = drawn(unnormalised(image, preprocess), ours.tolist(), theirs.tolist(), skeleton)
        error = float(off.mean()) if len(off) else None
        rows.append({"picture": picture(shown, SIDE), "labelled": len(off), "error": error})
    return rows


def drawn(
    image: Image.Image,
    predicted: Sequence[Sequence[float]],
    true: Sequence[Sequence[float]],
    skeleton: Sequence[Sequence[int]],
) -> Image.Image:
    """An image, enlarged, with predicted points as dots, and true ones as rings that a line connects with these.

    The skeleton is drawn through the predicted points. Points without a label (weight 0) are left out.
    """
    from PIL import Image, ImageDraw

    scale = SIDE / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    image = image.resize(size, Image.Resampling.BILINEAR).convert("RGB")
    draw = ImageDraw.Draw(image)
    ours, theirs = (
        [(scale * (p[0] + 0.5) - 0.5, scale * (p[1] + 0.5) - 0.5) for p in each] for each in (predicted, true)
    )
    labelled = [k for k, point in enumerate(true) if point[2] > 0]
    for i, j in skeleton:
        if i in labelled and j in labelled:
            draw.line([ours[i], ours[j]], "#ffffff", 2)
    for k in labelled:
        hue, (x, y), (a, b) = HUES[k % len(HUES)], ours[k], theirs[k]
        draw.line([ours[k], theirs[k]], hue, 2)
        draw.ellipse((a - 2 * _DOT, b - 2 * _DOT, a + 2 * _DOT, b + 2 * _DOT), outline=hue, width=2)
        draw.ellipse((x - _DOT, y - _DOT, x + _DOT, y + _DOT), hue, "#ffffff")
    return image
