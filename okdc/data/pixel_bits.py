"""Images of whole numbers beyond 8 bits (16-bit PNG, TIFF): how many bits their values fill, and those as 8 bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from okdc.data.images import PAGES, Images
from okdc.data.names import listed
from okdc.data.values import log
from okdc.errors import DataError
from okdc.system.waiting import limited

SAMPLE = 256  # images that are looked at before training
DEPTHS = (1, 8, 10, 12, 14, 16)  # bits that masks, screens, cameras and scanners use
DEEP_COLOURS = "16-bit colours"  # in the info of an image that Pillow has cut to the upper 8 of 16 bits
LEGACY = 16  # what networks were trained with before the range was looked for


def is_deep(image: Image.Image) -> bool:
    """Whether it is of whole numbers beyond 8 bits."""
    return image.mode.startswith("I")


def eight_bits(image: Image.Image, bits: int | None) -> Image.Image:
    """The image as L, of its `bits` the upper 8; ValueError for values beyond them, or where nobody knows how many.

    Pillow itself would clip all above 255 to white.
    """
    if bits is None:
        raise ValueError("a 16-bit image among others: say how many of its bits are used, --pixel-bits 16")
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() >= 2**bits:
        raise ValueError(
            f"values from {pixels.min()} to {pixels.max()}, and 0 to {2**bits - 1} expected: --pixel-bits N"
        )
    return Image.fromarray(((pixels << 8) >> bits).astype(np.uint8))


def find_bits(images: Images, timeout: float) -> int | None:
    """How many bits the values of deep images fill, by a sample of the training images; None where none is deep.

    Says which images of the sample have several pages. DataError for negative values and for those of more than 16
    bits, whose range nobody knows, and where no image comes for `timeout` seconds (0: never).
    """
    every = -(-len(images) // SAMPLE)

    def near(count: int) -> str:
        position = count * every // SAMPLE * SAMPLE
        return f"while decoding, near position {position} of {images.origin} ({images.name(position)})"

    paged: list[str] = []
    found = list(limited(_ranges(images, every, paged), timeout, near))
    if paged:
        log.warning(
            "images of %s have several pages or frames, of which the first one is read: %s",
            images.origin,
            listed(paged, 3),
        )
    _check_colours(images, max((high for kind, _, high in found if kind == DEEP_COLOURS), default=255))
    ranges = [(low, high) for kind, low, high in found if kind == "deep"]
    if not ranges:
        return None
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low < 0 or high >= 2 ** DEPTHS[-1]:
        raise DataError(
            f"the pixels of {images.origin} are whole numbers from {low} to {high}, and which of them is white is not "
            "known; expected 0 to 65535 at most. Save them with 8 or 16 bits"
            + ("." if low < 0 else f", or say how many bits are used: --pixel-bits {high.bit_length()}.")
        )
    bits = next(bits for bits in DEPTHS if high < 2**bits)
    log.warning(
        "pixels of %s are whole numbers up to %d: read as %d bits (--pixel-bits N says otherwise)",
        images.origin, high, bits,
    )  # fmt: skip
    return bits


def _ranges(images: Images, every: int, paged: list[str]) -> Iterator[tuple[str, int, int]]:
    """What kind of numbers each image of the sample has, and the lowest and highest of those that are looked at.

    `paged` is told the images of several pages.
    """
    for position in range(0, len(images), every):
        kind, low, high = "", 0, 0
        with contextlib.suppress(Exception):  # an image that cannot be read is named when its turn comes
            image, _ = images[position]
            if image.info.get(PAGES):
                paged.append(images.name(position))
            if is_deep(image):
                kind, low, high = "deep", int(np.asarray(image).min()), int(np.asarray(image).max())
            elif image.info.get(DEEP_COLOURS):
                kind, high = DEEP_COLOURS, int(np.asarray(image.convert("RGB")).max())
        yield kind, low, high


def _check_colours(images: Images, high: int) -> None:
    if high < 2 ** (DEPTHS[-2] - 8):
        raise DataError(
            f"the colours of {images.origin} have 16 bits and use {8 + high.bit_length()} of them at most, so that of "
            "the upper 8, which are read, little is left. Save them with 8 bits, or stretch them to 65535."
        )
