"""Small images kept decoded, on the GPU where there is one, and augmented in batches: the input never bounds a step.

Order, stand-ins for unreadable images and what comes after augmentation are the loader's own; a `Resident` stands in
the place of its DataLoader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from timm.data.loader import adapt_to_chs
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from okdc.data.batchwise import FILTERS, Law
from okdc.data.images import Images
from okdc.data.readable import BadImages
from okdc.data.samples import as_loaded
from okdc.data.transforms import image_transform, read, training_interpolation
from okdc.data.values import BadImage, Batch, log
from okdc.errors import DataError
from okdc.ranks import local_world, rank
from okdc.recipe import DataSettings
from okdc.system import memory
from okdc.system.randomness import derive_seed, mix
from okdc.system.signals import leave_signals
from okdc.system.waiting import limited

if TYPE_CHECKING:
    from okdc.data.samples import TrainImages

FITS = 2**30  # bytes, decoded, of which no machine runs short
SHARE = 8  # each how-manieth part of the machine's memory all decoded images of a split may take, in all its processes
SMALL = 128  # pixels a side: larger ones are decoded and cropped by the loader's processes, beside the training
FEW = 4096  # images that are not worth starting processes for
CHUNK = 256


@dataclass
class Decoded:
    """All images of a split, (N, C, H, W) uint8 on the device; of the unreadable ones, by position, it has none."""

    images: Tensor
    readable: Tensor  # (N,) bool, on the CPU

    def batch(self, positions: Tensor, device: torch.device) -> Tensor:
        """Those images on the device, wherever all of them are."""
        return self.images[positions.to(self.images.device)].to(device)

    def leave_device(self) -> None:
        """Be on the CPU from now on: who has trained may want the device's memory for something else."""
        self.images = self.images.cpu()


def keep(
    split: Images,
    settings: DataSettings,
    config: dict[str, Any],
    training: bool,
    bad: BadImages,
    device: torch.device,
    timeout: float = 0.0,
) -> Decoded | None:
    """The images of a split, decoded, or None where the loader is to read them, batch by batch.

    DataError where `--resident on` asks for what cannot be, for too many unreadable images, and where none comes for
    `timeout` seconds.
    """
    if settings.resident == "off":
        return None
    obstacle = _obstacle(settings, config, training)
    found = obstacle or _decode(split, settings, config, training, bad, device, timeout)
    if isinstance(found, Decoded):
        return found
    if settings.resident == "on":
        raise DataError(f"the images of {split.origin} cannot be kept decoded: {found}. Leave out --resident on.")
    return None


def law(settings: DataSettings, config: dict[str, Any]) -> Law:
    """What the settings do to a training image that `keep` has kept."""
    height, width = config["input_size"][-2:]
    if settings.no_aug:
        return Law((height, width))
    flipped = Law((height, width), hflip=settings.hflip, vflip=settings.vflip)
    if settings.crop_padding is not None:
        return replace(flipped, padding=settings.crop_padding)
    (least, most), (tall, wide) = settings.scale, settings.ratio
    return replace(
        flipped, scale=(least, most), ratio=(tall, wide), interpolation=training_interpolation(settings, config)
    )


def _obstacle(settings: DataSettings, config: dict[str, Any], training: bool) -> str | None:
    """Why the augmentation cannot be done to a batch at once, in words that say what to leave out."""
    if not training or settings.no_aug:
        return None
    if settings.aa or settings.color_jitter:
        return f"{'--aa' if settings.aa else '--color-jitter'} changes one image at a time"
    interpolation = training_interpolation(settings, config)
    if settings.crop_padding is None and interpolation not in FILTERS:
        flag = "--train-interpolation" if settings.train_interpolation else "--interpolation"
        return f"a resized crop with {flag} {interpolation} is done to one image at a time"
    return None


def _before_augmentation(settings: DataSettings, config: dict[str, Any], training: bool) -> Any:
    """PIL image -> uint8 tensor (C, H, W): all that is the same for an image in every epoch."""
    if not training or settings.no_aug:
        return image_transform(settings, config, training)
    if settings.crop_padding is None:
        return transforms.PILToTensor()
    side = max(config["input_size"][-2:])
    interpolation = str_to_interp_mode(training_interpolation(settings, config))
    return transforms.Compose([transforms.Resize(side, interpolation=interpolation), transforms.PILToTensor()])


def _decode(
    split: Images,
    settings: DataSettings,
    config: dict[str, Any],
    training: bool,
    bad: BadImages,
    device: torch.device,
    timeout: float,
) -> Decoded | str:
    """All images in one tensor, or why not, in words."""
    source = _Decoding(split, _before_augmentation(settings, config, training), config)
    firsts = map(source.first, range(len(split)))
    example = next((image for image in limited(firsts, timeout, source.near) if image is not None), None)
    if example is None:
        return "none of them can be read"
    size = len(split) * example.nbytes
    if settings.resident == "auto" and (size > _room(device) or max(*example.shape, *config["input_size"]) > SMALL):
        return "they are too many, or too large"
    if settings.resident == "auto" and size > (memory.free() or size):
        log.warning("the images of %s are not kept decoded, as they usually would be: memory is short", split.origin)
        return "memory is short"
    images = torch.empty(len(split), *example.shape, dtype=torch.uint8)
    readable = torch.zeros(len(split), dtype=torch.bool)
    unread: list[BadImage] = []
    for positions, decoded, failed in _chunks(source, settings.workers, timeout):
        unread += failed
        if any(image.shape != example.shape for image in decoded):
            return "they are not all of one size"
        if positions:
            images[positions] = decoded
            readable[positions] = True
    for image in unread:
        bad.add(*image)
    return Decoded(images.to(device), readable)


def _room(device: torch.device) -> int:
    """Bytes that decoded images may take.

    Of the machine's whole memory, and not of what is free, so that a run that is resumed here does as it did before.
    """
    room = max(FITS, (memory.total() or 0) // SHARE // local_world())
    return min(room, torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else room


class _Decoding(Dataset):
    """(positions, their images, the unreadable ones) of a chunk; images of one size as one tensor."""

    def __init__(self, split: Images, transform: Any, config: dict[str, Any]) -> None:
        self.split, self.transform, self.config = split, transform, config

    def __len__(self) -> int:
        return len(self.split)

    def near(self, position: int) -> str:
        position = min(position, len(self) - 1)
        return f"while decoding, near position {position} of {self.split.origin} ({self.split.name(position)})"

    def first(self, position: int) -> Tensor | None:
        image = read(self.split, position, self.config, [])
        return None if image is None else self.transform(image)

    def __getitems__(self, positions: list[int]) -> tuple[list[int], Any, list[BadImage]]:
        failed: list[BadImage] = []
        samples = [(position, read(self.split, position, self.config, failed)) for position in positions]
        found = [(position, self.transform(image)) for position, image in samples if image is not None]
        images = [image for _, image in found]
        # One tensor travels between processes faster than many.
        together = torch.stack(images) if len({image.shape for image in images}) == 1 else images
        return [position for position, _ in found], together, failed


def _chunks(source: _Decoding, workers: int, timeout: float) -> Iterator[Any]:
    loader: DataLoader = DataLoader(
        source,
        batch_size=CHUNK,
        num_workers=workers if len(source) >= FEW else 0,
        collate_fn=as_loaded,
        worker_init_fn=leave_signals,
        generator=torch.Generator(),
    )
    console = Console(stderr=True)
    many = len(source) >= FEW and rank() == 0
    if many and not console.is_terminal:
        log.info("decoding %d images of %s", len(source), source.split.origin)
    chunks = limited(loader, timeout, lambda count: source.near(count * CHUNK))
    hidden = not (many and console.is_terminal)
    yield from track(chunks, "decoding", len(loader), console=console, transient=True, disable=hidden)


class Normalised:
    """uint8 images (B, C, H, W) as timm's PrefetchLoader gives them: float32, by mean and std."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        channels = config["input_size"][0]
        self.mean, self.std = (
            torch.tensor([255 * x for x in adapt_to_chs(config[name], channels)], device=device).view(1, channels, 1, 1)
            for name in ("mean", "std")
        )

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().sub_(self.mean).div_(self.std)


class ResidentTraining:
    """Training batches, each as (views * B, C, H, W) float32 and the positions of the images (B,)."""

    def __init__(
        self, kept: Decoded, law: Law, dataset: TrainImages, places: Any, config: dict[str, Any], device: torch.device
    ) -> None:
        self.kept, self.dataset, self.places, self.law, self.device = kept, dataset, places, law, device
        self.normalised = Normalised(config, device)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Batch]:
        data, epoch, positions = self.dataset, -1, torch.empty(0)
        for batch in self.places:
            if batch[0][0] != epoch:
                epoch = batch[0][0]
                positions = data.order.of(epoch)
            places = torch.tensor([place for _, place in batch])
            shown = self._readable(positions, places)
            keys = mix(positions[places]) + (places if data.order.repeats else 0)
            images = self.kept.batch(shown, self.device)
            views = [
                self.law(images, mix(keys + (derive_seed(data.seed, epoch, 2, view) << 31)).to(self.device))
                for view in range(len(data.transforms))  # crops and flips all, which are as weak as strong
            ]
            yield self.normalised(torch.cat(views) if len(views) > 1 else views[0]), shown.to(self.device)

    def _readable(self, positions: Tensor, places: Tensor) -> Tensor:
        """The images of places; an unreadable one gives its place to another."""
        shown = positions[places]
        for i in (~self.kept.readable[shown]).nonzero().flatten().tolist():
            others = self.dataset.order.candidates(positions, int(places[i]))
            shown[i] = next(position for position in others if self.kept.readable[position])
        return shown


class ResidentInOrder:
    """Validation batches, (B, C, H, W) float32 and the positions of the images; unreadable ones are left out."""

    def __init__(self, kept: Decoded, batches: Any, config: dict[str, Any], device: torch.device) -> None:
        self.kept, self.batches, self.device = kept, batches, device
        self.normalised = Normalised(config, device)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            positions = torch.tensor(batch)
            positions = positions[self.kept.readable[positions]]
            if len(positions):
                images = self.kept.batch(positions, self.device)
                yield self.normalised(images), positions.to(self.device)
