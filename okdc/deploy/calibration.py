"""The training images for int8: drawn by a seed, prepared as for evaluation, none validated on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from okdc.errors import ExportError
from okdc.system import shipped
from okdc.verification.schema import Calibration

SEED = 0


def draw(data: Any, count: int, apart: bool = True, further: int = 0) -> tuple[np.ndarray, Calibration]:
    """Up to `count` training images (N, C, H, W) float32 as the network takes them, and where they come from.

    data: an okdc.data.Data. Images that are validation images too, the same file or, where they have no files, the same
    pixels, are left out and counted, if they are to be `apart`. A stream or a shuffled loader of the user's gives the
    images of its first batches, as it trains on them; one that comes in a fixed order, perhaps class by class, those of
    places that are drawn from the whole of it. After those may come up to `further` images, of which the facts do not
    tell. Raises ExportError when there are none.
    """
    plain = getattr(getattr(data, "train", None), "plain", None)  # of crops that predict.py would need a box for
    augmented, shared = getattr(data, "training_images", None) is None and plain is None, None
    if plain is not None:
        images = [image for batch, _ in plain(_shuffled(data.sizes[0])[: count + further]) for image in batch.numpy()]
    elif augmented:
        images = _as_trained(data, count + further)
    else:
        known = _Validated(data.validation_images or () if apart else ())
        images, shared = _raw(data, count + further, known)
    if len(images) < 2:
        raise ExportError(
            f"int8 is calibrated on at least two training images, and {data.name} has {len(images)} that are not "
            "validation images too: give other data, or leave --int8 out."
        )
    array = np.stack(images)
    first = array[:count]
    facts: Calibration = {
        "images": len(first), "seed": SEED, "sha256": hashlib.sha256(first.tobytes()).hexdigest(),
        "augmented": augmented, "also_validated": shared,
    }  # fmt: skip
    return array, facts


def _raw(data: Any, count: int, known: _Validated) -> tuple[list[np.ndarray], int]:
    predict = shipped.load(shipped.folder("export") / "predict.py")  # equal to the evaluation transform, bit for bit
    images: list[np.ndarray] = []
    shared = 0
    for position in _shuffled(len(data.training_images)):
        if len(images) == count:
            break
        try:
            image, _ = data.training_images[position]
            pixels = predict.preprocess(image, data.preprocess)
        except Exception:  # unreadable, or of a kind that is not trained on; training has named it
            continue
        if known.has(data.training_images, position, image):
            shared += 1
        else:
            images.append(pixels)
    return images, shared


def _as_trained(data: Any, count: int) -> list[np.ndarray]:
    """Images of one pass over the training batches, in random order."""
    images = _one_by_one(data)
    if getattr(data.train, "in_order", False):
        chosen = set(_shuffled(data.sizes[0])[:count])
        found = list(islice((image for place, image in enumerate(images) if place in chosen), count))
    else:
        found = list(islice(images, count))
    return [found[place] for place in _shuffled(len(found))]


def _one_by_one(data: Any) -> Iterator[np.ndarray]:
    for batch in data.train.batches(0):
        images = batch[0][0] if batch[0].dim() == 5 else batch[0]  # the first of several views
        yield from np.ascontiguousarray(images.detach().float().cpu().numpy())


def _shuffled(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(SEED)).tolist()


class _Validated:
    """The images that are validated on: known by the content of their files, else by their pixels.

    Of files those alone are read that are as large as the one that is asked about, and none is decoded.
    """

    def __init__(self, images: Any) -> None:
        files: list[str | None] = images.files() if hasattr(images, "files") else []
        self.by_size: dict[int, list[str]] = {}
        self.pixels: set[bytes] | None = None
        if files and all(file and os.path.isfile(file) for file in files):
            for file in filter(None, files):
                self.by_size.setdefault(os.path.getsize(file), []).append(file)
        else:
            self.pixels = {_digest(image) for image, _ in images}
        self.content = cache(_content)

    def has(self, images: Any, position: int, image: Image.Image) -> bool:
        """Whether the image in this position of others is one of them."""
        if self.pixels is not None:
            return _digest(image) in self.pixels
        file = images.file(position)
        return any(self.content(other) == _content(file) for other in self.by_size.get(os.path.getsize(file), ()))


def _content(file: str) -> bytes:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").digest()


def _digest(image: Image.Image) -> bytes:
    return hashlib.blake2b(image.tobytes() + repr((image.mode, image.size)).encode(), digest_size=16).digest()
