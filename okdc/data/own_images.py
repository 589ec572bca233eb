"""What lies behind a DataLoader of a user's own: labels, raw images, and what is done to them, where that can be told.

A transform is read where it is plain: `Resize`, `CenterCrop`, a conversion to float from 0 to 1, `Normalize`, each at
most once, by torchvision (v1, v2, the presets of its weights) or by timm (also with its loader's normalisation on the
device). What was read counts only if predict.py then makes of raw images what the loader makes of them.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import transforms as timms
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification

from okdc.data.values import Batch, Label
from okdc.system import shipped

LEVELS = 2.5  # of 255: torchvision resizes tensors of whole numbers to within two levels of Pillow
TRIED = 8  # images of the first batch

# A letter for each step: resize, crop, float, uint8, division by 255, normalise.
_STEPS = {
    v1.Resize: "r", v2.Resize: "r", v1.CenterCrop: "c", v2.CenterCrop: "c", v1.ToTensor: "f", timms.MaybeToTensor: "f",
    v1.PILToTensor: "u", v2.PILToTensor: "u", v2.ToImage: "u", timms.MaybePILToTensor: "u", timms.ToNumpy: "u",
    v1.ConvertImageDtype: "d", v2.ToDtype: "d", v1.Normalize: "n", v2.Normalize: "n",
}  # fmt: skip
_PLAIN = re.compile("(r?c?f|r?c?ud|ur?c?d)n?")
_OF_TIMMS_LOADER = re.compile("r?c?u")
_FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")  # Pillow's


class OwnImages:
    """(PIL image as stored, class index) of a data set whose transform is left out."""

    def __init__(self, dataset: Any, indices: Sequence[int]):
        self.dataset, self.indices = dataset, indices

    def __iter__(self) -> Iterator[tuple[Image.Image, Label]]:
        for index in self.indices:
            image, label = self.dataset[index]
            yield image, torch.as_tensor(label).tolist()

    def only(self, places: Sequence[int]) -> OwnImages:
        """The images in these places; the others are not read."""
        return OwnImages(self.dataset, [self.indices[place] for place in places if place < len(self.indices)])


def shuffles(loader: Any) -> bool:
    """Whether its images come in a random order, as far as can be told."""
    sampler = getattr(loader, "sampler", None)
    return isinstance(sampler, Sampler) and not isinstance(sampler, SequentialSampler) and _is_plain(loader)


def labels(loader: Any) -> Tensor | None:
    """The labels (images,) int64 that it gives, in order, where its data set has them in a list; else None."""
    if (found := _behind(loader)) is None:
        return None
    dataset, indices = found
    listed = dataset.tensors[1] if isinstance(dataset, TensorDataset) else getattr(dataset, "targets", None)
    try:
        every = torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError):
        return None
    if every.is_floating_point() or every.shape != (len(dataset),):
        return None
    return every[torch.as_tensor(indices, dtype=torch.int64)].long()


def raw_images(loader: Any) -> OwnImages | None:
    """Its images without the data set's `transform`; None where they do not come in order or are no PIL images."""
    found = _behind(loader)
    if found is None or not hasattr(found[0], "transform"):
        return None
    dataset = copy.copy(found[0])
    for name in {"transform", "transforms"} & set(vars(dataset)):
        setattr(dataset, name, None)
    images = OwnImages(dataset, found[1])
    try:
        return images if isinstance(next(iter(images))[0], Image.Image) else None
    except Exception:  # a data set that cannot do without
        return None


def difference(images: OwnImages, batch: Batch, config: dict[str, Any]) -> float | None:
    """The largest difference, in levels of 255, of what predict.py makes of raw images and a loader's first batch.

    None where predict.py cannot take them, or they are others.
    """
    predict, (pixels, classes) = shipped.load(shipped.folder("export") / "predict.py"), batch
    every = max(1, len(pixels) // TRIED)
    std, largest = torch.tensor(config["std"]).view(-1, 1, 1), 0.0
    try:
        for place, (image, label) in zip(range(0, len(pixels), every), images.only(range(0, len(pixels), every))):
            if label != classes[place].tolist():
                return None
            made = torch.from_numpy(predict.preprocess(image, config))
            largest = max(largest, float(((made - pixels[place].cpu()) * std * 255).abs().max()))
    except Exception:  # another number of channels, labels that are no numbers
        return None
    return largest


def read_transform(loader: Any, input_size: tuple[int, ...]) -> dict[str, Any] | None:
    """What its data set's transform does, in the words of preprocess.json; None where that is not plain."""
    found = _behind(loader)
    parts = _parts(getattr(found[0], "transform", None)) if found else []
    word = "".join(_STEPS.get(type(part), "?") for part in parts)
    steps = dict(zip(word, parts))
    if isinstance(loader, PrefetchLoader) and _OF_TIMMS_LOADER.fullmatch(word):
        values = {key: tuple((getattr(loader, key).float().flatten() / 255).tolist()) for key in ("mean", "std")}
    elif _PLAIN.fullmatch(word) and not isinstance(loader, PrefetchLoader) and _is_float(steps.get("d")):
        normal, channels = steps.get("n"), input_size[0]
        values = {key: _numbers(getattr(normal, key, value)) for key, value in (("mean", 0.0), ("std", 1.0))}
        values = {key: each * channels if len(each) == 1 else each for key, each in values.items()}
    else:
        return None
    shape = _geometry(steps.get("r"), steps.get("c"), input_size[-2:])
    return None if shape is None else {"input_size": input_size, **values, **shape}


def _is_plain(loader: Any) -> bool:
    batches = getattr(loader, "batch_sampler", None)
    return type(batches) is BatchSampler and batches.sampler is loader.sampler


def _behind(loader: Any) -> tuple[Any, Sequence[int]] | None:
    """The data set of a loader and the indices that it gives, where these come in order."""
    loader = loader.loader if isinstance(loader, PrefetchLoader) else loader
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, SequentialSampler) or not _is_plain(loader):
        return None
    dataset, count = loader.dataset, len(loader.sampler)
    batch = loader.batch_size or 1
    indices: Sequence[int] = range(count // batch * batch if loader.drop_last else count)
    while isinstance(dataset, Subset):
        indices, dataset = [dataset.indices[index] for index in indices], dataset.dataset
    return dataset, indices


def _parts(transform: Any) -> list[Any]:
    if isinstance(transform, (v1.Compose, v2.Compose)):
        return [part for each in transform.transforms for part in _parts(each)]
    if isinstance(transform, ImageClassification):  # of torchvision's weights
        resize = v1.Resize(transform.resize_size, transform.interpolation, antialias=transform.antialias)
        crop, last = v1.CenterCrop(transform.crop_size), v1.Normalize(transform.mean, transform.std)
        return [resize, crop, v1.PILToTensor(), v1.ConvertImageDtype(torch.float32), last]
    return [transform]


def _is_float(part: Any) -> bool:
    return part is None or (part.dtype == torch.float32 and getattr(part, "scale", True))


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(torch.as_tensor(value, dtype=torch.float64).flatten().tolist())


def _geometry(resize: Any, crop: Any, size: tuple[int, ...]) -> dict[str, Any] | None:
    """How images of any size become images of `size` (H, W); None where timm's words do not say it."""
    height, width = size
    if crop is not None and tuple(crop.size) != (height, width):
        return None
    if resize is None:  # images that have this size already; of others nothing is known
        assumed = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
        return None if crop is not None else assumed | {"assumed": ["interpolation", "crop_pct"]}
    interpolation = getattr(resize.interpolation, "value", resize.interpolation)  # an enumeration, or its word
    sides = [resize.size] if isinstance(resize.size, int) else list(resize.size)
    if interpolation not in _FILTERS or resize.max_size is not None or resize.antialias is False:
        return None
    resized = tuple(sides * 2)[:2]
    if (len(sides) == 1 and height != width) or (crop is None and resized != (height, width)):
        return None
    share = _share(height, sides[0])
    if (math.floor(height / share), math.floor(width / share)) != resized:
        return None
    mode = "center" if len(sides) == 1 else "squash"
    return {"interpolation": interpolation, "crop_pct": share, "crop_mode": mode}


def _share(side: int, resized: int) -> float:
    """The crop_pct by which `side` becomes `resized`: timm rounds side / crop_pct down."""
    share = side / resized
    return share if math.floor(side / share) >= resized else math.nextafter(share, 0)
