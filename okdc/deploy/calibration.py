"""The training images for int8: drawn by a seed, prepared as for evaluation, none validated on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from okdc.errors import ExportError
from okdc.system import shipped
from okdc.verification.schema import Calibration

SEED = 0


def draw(data: Any, count: int, validated: int | None = None, further: int = 0) -> tuple[np.ndarray, Calibration]:
    """Up to `count` training images (N, C, H, W) float32 as the network takes them, and where they come from.

    data: an okdc.data.Data. Images that are equal to one of the first `validated` validation images (all when None) are
    left out and counted. A stream or a loader of the user's gives the images of its first batches, as it trains on
    them. After those may come up to `further` images, of which the facts do not tell. Raises ExportError when there are
    none.
    """
    augmented, shared = getattr(data, "training_images", None) is None, None
    if augmented:
        images = list(islice(_as_trained(data), count + further))
    else:
        known = {_digest(image) for image, _ in islice(data.validation_images or (), validated)}
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


def _raw(data: Any, count: int, known: set[bytes]) -> tuple[list[np.ndarray], int]:
    predict = shipped.load(shipped.folder("export") / "predict.py")  # equal to the evaluation transform, bit for bit
    order = torch.randperm(len(data.training_images), generator=torch.Generator().manual_seed(SEED))
    images: list[np.ndarray] = []
    shared = 0
    for position in order.tolist():
        if len(images) == count:
            break
        try:
            image, _ = data.training_images[position]
            pixels = predict.preprocess(image, data.preprocess)
        except Exception:  # unreadable, or of a kind that is not trained on; training has named it
            continue
        if _digest(image) in known:
            shared += 1
        else:
            images.append(pixels)
    return images, shared


def _as_trained(data: Any) -> Iterator[np.ndarray]:
    for batch in data.train.batches(0):
        images = batch[0][0] if batch[0].dim() == 5 else batch[0]  # the first of several views
        yield from np.ascontiguousarray(images.detach().float().cpu().numpy())


def _digest(image: Image.Image) -> bytes:
    return hashlib.blake2b(image.tobytes() + repr((image.mode, image.size)).encode(), digest_size=16).digest()
