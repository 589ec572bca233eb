"""What happens to an image on its way into a batch, and to a batch on its way into the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.loader import adapt_to_chs
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms

from okdc.data.images import Images
from okdc.data.pixel_bits import LEGACY, eight_bits, is_deep
from okdc.data.values import BadImage, Batch
from okdc.errors import DataError
from okdc.recipe import DataSettings
from okdc.system.randomness import borrowed_generators, reseed

MODES = {1: "L", 3: "RGB"}
ORIENTATION = 0x0112  # the tag of EXIF, and what undoes each of its values but 1, which is upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def preprocessing(settings: DataSettings, config: dict[str, Any]) -> dict[str, Any]:
    """The network's own `config` with what the settings say otherwise; mean and std have one number per channel.

    `exif` is there where it is on: what was trained before there was such a setting has no such key.
    """
    given = {key: getattr(settings, key) for key in ("mean", "std", "interpolation", "crop_pct", "pixel_bits")}
    config = config | {key: value for key, value in given.items() if value is not None}
    config = {key: value for key, value in config.items() if key != "exif"} | ({"exif": True} if settings.exif else {})
    channels = config["input_size"][0]
    if channels not in MODES:
        raise DataError(
            f"the network takes {channels} channels; images can be given as 1 (grey) or 3 (RGB). Use --in-chans 1 or "
            f"3, or pass your own loader of {channels}-channel tensors to okdc.compress()."
        )
    return config | {key: tuple(adapt_to_chs(config[key], channels)) for key in ("mean", "std")}


def of_strength(settings: DataSettings, strength: str) -> DataSettings:
    """The settings for a view: all of them for a strong one, crops and flips alone for a weak one."""
    return settings if strength == "strong" else replace(settings, aa=None, color_jitter=0.0, reprob=0.0)


def image_transform(settings: DataSettings, config: dict[str, Any], training: bool) -> transforms.Compose:
    """PIL image -> uint8 tensor (C, H, W), by timm's recipe; normalised later, a whole batch at a time.

    Raises DataError for an augmentation policy or an interpolation that timm does not know.
    """
    options: dict[str, Any] = {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    if training:
        options |= {key: getattr(settings, key) for key in ("no_aug", "scale", "ratio", "hflip", "vflip")}
        options |= {"auto_augment": settings.aa, "color_jitter": settings.color_jitter or None}
        options["interpolation"] = training_interpolation(settings, config)
    try:
        transform = create_transform(config["input_size"], is_training=training, use_prefetcher=True, **options)
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(
            f"no image transform can be made of --aa {settings.aa} and --interpolation {options['interpolation']} "
            f"({type(error).__name__}: {error}); expected a policy such as rand-m9-mstd0.5 or augmix-m3-w2, and "
            "nearest, bilinear, bicubic or lanczos."
        ) from error
    if training and settings.crop_padding is not None and not settings.no_aug:
        size = tuple(config["input_size"][-2:])
        # CIFAR's way takes the place of timm's first step, the random resized crop.
        transform.transforms[:1] = [
            transforms.Resize(max(size), interpolation=str_to_interp_mode(options["interpolation"])),
            transforms.RandomCrop(size, padding=settings.crop_padding),
        ]
    return transform


def training_interpolation(settings: DataSettings, config: dict[str, Any]) -> str:
    """How training images are resized; DataError for a random way where there is no resized crop to draw it for."""
    if settings.train_interpolation == "random" and settings.crop_padding is not None:
        raise DataError(
            "--train-interpolation random draws one way for each resized crop, and with --crop-padding there is none: "
            "choose bilinear or bicubic, or leave it out."
        )
    return settings.train_interpolation or config["interpolation"]


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says that it is seen; as stored where that says nothing or cannot be read."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # malformed EXIF data of a photo that is whole: Pillow's parser raises nearly anything
        return image
    # Not ImageOps.exif_transpose, which also writes the other tags anew and fails where one is malformed.
    return image if turn is None else image.transpose(turn)


def convert(image: Image.Image, mode: str, bits: int | None = LEGACY) -> Image.Image:
    """Any PIL image as RGB or L, whole numbers by their `bits`; ValueError for numbers whose range nobody knows."""
    if image.mode == "F":
        raise ValueError("an image of floating-point numbers has no known range: save it with 8 or 16 bits")
    if is_deep(image):
        image = eight_bits(image, bits)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the colours are those of a direct conversion, of which Pillow warns
    return image if image.mode == mode else image.convert(mode)


def read(images: Images, position: int, config: dict[str, Any], bad: list[BadImage]) -> Image.Image | None:
    """An image, or None where it cannot be read, which `bad` is then told."""
    try:
        image, _ = images[position]
        image = upright(image) if config.get("exif") else image
        return convert(image, MODES[config["input_size"][0]], config.get("pixel_bits"))
    except Exception as error:  # Pillow's decoders raise nearly anything on broken files
        bad.append((images.name(position), f"{type(error).__name__}: {error}", int(images.kinds[position])))
        return None


class BatchAugmentation:
    """Random erasing, mixup, cutmix and label smoothing of a batch, or of a rank's part of one.

    Its random numbers are f(seed, epoch, step), those of erasing also of the image's place in the batch. `strengths`
    are those of the views: weak ones are not erased.
    """

    def __init__(
        self,
        settings: DataSettings,
        num_classes: int,
        seed: int,
        device: torch.device,
        strengths: Sequence[str] = ("strong",),
    ):
        self.num_classes, self.seed, self.smoothing = num_classes, seed, settings.smoothing
        self.strengths = strengths
        active = not settings.no_aug
        self.erase = None
        if settings.reprob and active:
            # Random colours come from the CPU's generator, which is seeded here: a GPU's belongs to the network.
            where = device if settings.remode == "const" else "cpu"
            self.erase = RandomErasing(settings.reprob, mode=settings.remode, max_count=settings.recount, device=where)
        self.mixup, self.mixes_until = None, settings.mixup_off_epoch or math.inf
        if settings.mixup or settings.cutmix:
            law = {"prob": settings.mixup_prob, "switch_prob": settings.mixup_switch_prob}
            self.mixup = Mixup(
                settings.mixup, settings.cutmix, **law, label_smoothing=settings.smoothing, num_classes=num_classes
            )
            self.pair = Mixup(settings.mixup, settings.cutmix, **law, label_smoothing=0, num_classes=2)

    def __call__(
        self, images: Tensor, labels: Tensor, epoch: int, step: int, places: Sequence[int] | None = None
    ) -> Batch:
        """images (B, C, H, W), labels (B,) int64 -> images, labels; the latter (B, classes) float where soft.

        Views (V, B, C, H, W) are erased each in its own place, and all mixed alike, because they share their labels.
        """
        places = places or range(len(labels))
        if self.erase:
            with borrowed_generators(self.seed):
                each = images if images.dim() == 5 else images[None]
                for view, (strength, of_view) in enumerate(zip(self.strengths, each, strict=True)):
                    for place, image in zip(places, of_view, strict=True) if strength == "strong" else ():
                        reseed(self.seed, epoch, step, 1, view, place)
                        self.erase(image)
        if images.dim() == 5:
            views = [self._mixed(view, labels, epoch, step) for view in images]
            return torch.stack([view for view, _ in views]), views[0][1]
        return self._mixed(images, labels, epoch, step)

    def mixed_of(self, indices: Tensor, images: Tensor, epoch: int, step: int) -> Batch:
        """Of what images (B, C, H, W) of these `indices` (B,) are mixed: indices (B, 2), and shares (B,) of the first.

        timm mixes an image with the one as far from the other end, and all of a batch alike.
        """
        even = len(indices) // 2 * 2
        others = torch.cat([indices[:even].flip(0), indices[even:]])
        shares = torch.ones(len(indices), device=images.device)
        two, classes = images.new_zeros(2, 1, *images.shape[-2:]), torch.arange(2, device=images.device)
        with self._drawing(self.pair, epoch, step) as mixup:
            shares[:even] = mixup(two, classes)[1][0, 0]
        return torch.stack([indices, others], 1), shares

    @contextmanager
    def _drawing(self, mixup: Mixup, epoch: int, step: int) -> Iterator[Mixup]:
        """It, set for the epoch, while random numbers are the step's."""
        mixup.mixup_enabled = epoch < self.mixes_until  # labels stay soft, as timm's do
        with borrowed_generators(self.seed, epoch, step, 3):
            yield mixup

    def _mixed(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> Batch:
        if self.mixup:
            with self._drawing(self.mixup, epoch, step) as mixup:
                return self._mix(mixup, images, labels)
        if self.smoothing:
            labels = mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        return images, labels

    def _mix(self, mixup: Mixup, images: Tensor, labels: Tensor) -> Batch:
        even = len(images) // 2 * 2  # timm mixes pairs; the odd one out stays as it is
        mixed, targets = mixup(images[:even], labels[:even])
        rest = mixup_target(labels[even:], self.num_classes, smoothing=self.smoothing)
        return torch.cat([mixed, images[even:]]), torch.cat([targets, rest])
