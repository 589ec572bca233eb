"""Batches from a source whose images can be read one by one, in an order and with augmentation that keep no state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from okdc.data.batches import OrderedBatches, RawImages, ShuffledBatches
from okdc.data.batchwise import Law
from okdc.data.images import Images
from okdc.data.names import listed
from okdc.data.pixel_bits import find_bits
from okdc.data.pose_batches import load_poses
from okdc.data.poses import PoseSource
from okdc.data.readable import BadImages, check_readable
from okdc.data.resident import Decoded, keep, law
from okdc.data.samples import Order, Part, TrainImages, ValidationImages
from okdc.data.streams import Stream, load_stream
from okdc.data.transforms import BatchAugmentation, image_transform, of_strength, preprocessing
from okdc.data.values import Batch, Data, Source, log
from okdc.errors import DataError, counted
from okdc.needs import NOTHING, Needs
from okdc.recipe import DataSettings

HELD_OUT = 20  # each how-manieth image of a class is set aside where a method needs some


def load(
    source: Source | PoseSource,
    settings: DataSettings,
    config: dict[str, Any],
    *,
    batch_size: int,
    validation_batch_size: int | None,
    seed: int,
    device: torch.device | str,
    needs: Needs = NOTHING,
    views: int = 1,
    rank: int = 0,
    world: int = 1,
    timeout: float = 0.0,
) -> Data:
    """Batch a source for a network whose `config` has timm's input_size, mean, std, interpolation, crop_pct, crop_mode.

    Batches are normalised float32 on `device`, and meet the method's `needs`; `views` is how many views of each image
    these are where it needs one for each member. Where `world` processes train together, each has `batch_size` images
    of one larger batch, and this one is the `rank`-th. Raises DataError when they cannot, when there are fewer training
    images than one batch, when a class has no image that can be read, and, later, when too many images cannot be; also
    when those that are looked at do not come for `timeout` seconds (0: never).
    """
    device = torch.device(device)
    if batch_size < 1:
        raise DataError(f"the batch size is {batch_size}; expected 1 or more: -b 128")
    strengths = needs.strengths(views)
    if isinstance(source, PoseSource):
        _refuse_needs(needs, f"{source.name} has key points. Choose")
        return load_poses(
            source, settings, config, batch_size=batch_size, validation_batch_size=validation_batch_size or batch_size,
            seed=seed, device=device, part=Part(batch_size, rank, world),
        )  # fmt: skip
    config = preprocessing(settings, config)
    augmentation = BatchAugmentation(settings, len(source.classes), seed, device, strengths)
    part = Part(batch_size, rank, world, mirrored=augmentation.mixup is not None)
    validation_batch_size = validation_batch_size or batch_size
    _refuse_blends(settings, needs)
    _refuse_balance(settings, needs)
    _tell_alike(settings, strengths)
    if isinstance(source.train, Stream):
        _refuse_stream(settings, needs)
        return load_stream(source, settings, config, part, validation_batch_size, seed, augmentation, device)
    images, aside = _set_aside(source, settings.holdout)
    images, held_out = images.split(HELD_OUT) if needs.held_out else (images, None)
    _check_fills(part, len(images), source.name)
    if "pixel_bits" not in config and (bits := find_bits(source.train, timeout)):
        config["pixel_bits"] = bits
    order = Order(images.labels, seed, part.whole if needs.pairs else None, settings.balanced_sampling)
    if needs.pairs and (alone := (images.labels.bincount() == 1).nonzero().flatten().tolist()):
        log.warning("only one training image, so no pair: class %s", listed(source.classes[i] for i in alone))
    attempts = min(settings.max_bad_images + 1, len(images))
    transforms = [image_transform(of_strength(settings, strength), config, True) for strength in strengths]
    train = TrainImages(images, order, transforms, config, attempts, seed)

    reasons: dict[str, str] = {}
    bad, validation_bad = (
        BadImages(settings.max_bad_images, split, _kinds(source), whole.kinds, reasons)
        for split, whole in (("training", source.train), ("validation", source.validation))
    )

    resident: tuple[Decoded, Law] | None = None

    def in_order(these: Images, bad: BadImages) -> OrderedBatches:
        dataset = ValidationImages(these, image_transform(settings, config, False), config)
        # Where training reads image by image, so does validation: decoding it all at the start would make that late.
        kept = keep(these, settings, config, False, bad, device, timeout) if resident else None
        return OrderedBatches(dataset, validation_batch_size, settings.workers, config, bad, device, kept)

    if kept := keep(images, settings, config, True, bad, device, timeout):
        resident = kept, law(settings, config)
    else:
        check_readable(images, bad, config, timeout)
    validation = in_order(source.validation, validation_bad)
    if not validation.kept:
        check_readable(source.validation, validation_bad, config, timeout)
    return Data(
        train=ShuffledBatches(train, part, settings.workers, config, bad, augmentation, device, needs, resident),
        validation=in_order(aside, bad) if aside else validation,
        test=validation if aside else None,
        validation_images=RawImages(source.validation, config, validation_bad),
        classes=source.classes,
        preprocess=config,
        name=source.name,
        sizes=(len(images), len(source.validation)),
        bad_images=reasons,
        train_labels=images.labels,
        held_out=in_order(held_out, bad) if held_out else None,
        training_images=images,
        image_counts={each.split: each.counts for each in (bad, validation_bad)},
    )


def in_order(data: Data, count: int) -> Iterator[Batch]:
    """Batches of `count` training images, as a network is judged on them; of a user's own loader, as it trains."""
    if data.training_images is None:
        yield from _first(data.train.batches(0), count)
        return
    images: Any = data.training_images
    dataset = ValidationImages(images, image_transform(DataSettings(), data.preprocess, False), data.preprocess)
    places = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].sort().values.tolist()
    bad = BadImages(len(images), "training", (*data.classes, "none of them"), images.kinds, dict(data.bad_images))
    yield from OrderedBatches(dataset, 64, 0, data.preprocess, bad, torch.device("cpu"), places=places)


def _first(batches: Iterable[Any], count: int) -> Iterator[Batch]:
    for images, labels, *_ in batches:
        yield images[0] if images.dim() == 5 else images, labels  # the first of several views
        count -= len(labels)
        if count <= 0:
            return


def _kinds(source: Source) -> tuple[str, ...]:
    """The names of what `Images.kinds` numbers."""
    return source.classes if source.train.labels.ndim == 1 else (*source.classes, "none of them")


def _set_aside(source: Source, share: float | None) -> tuple[Images, Images | None]:
    """The training images without that share of each class, and these; DataError where no class has two."""
    if share is None:
        return source.train, None
    images, aside = source.train.split(round(1 / share))
    if not len(aside):
        raise DataError(
            f"--holdout {share:g}: no class of {source.name} has two training images, so none can be set aside. Leave "
            "it out, or give more images."
        )
    return images, aside


def _check_fills(part: Part, images: int, name: str) -> None:
    if images < part.whole:
        devices = f" on each of {part.world} devices" if part.world > 1 else ""
        raise DataError(
            f"{name} has {counted(images, 'training image')}, fewer than one batch of {part.size}{devices}; expected a "
            f"batch that they fill: -b {max(1, min(images // part.world, 32))}"
        )


def _refuse_blends(settings: DataSettings, needs: Needs) -> None:
    if (needs.pairs or needs.indices) and not needs.mixed and (settings.mixup or settings.cutmix):
        raise DataError(
            "the method compares images of one class with images of others, and --mixup and --cutmix make images "
            "that are of two classes. Leave them out, or choose another --method. A method of your own that can take "
            "them says so: Needs(mixed=True)."
        )


def _refuse_balance(settings: DataSettings, needs: Needs) -> None:
    if settings.balanced_sampling and needs.pairs:
        raise DataError(
            "the method makes batches of pairs, in an order of its own that draws every class equally often already. "
            "Leave out --balanced-sampling."
        )


def _tell_alike(settings: DataSettings, strengths: Sequence[str]) -> None:
    """A warning where a method asks for weak and strong views, and the settings make no difference."""
    alike = settings.no_aug or of_strength(settings, "weak") == settings
    if len(set(strengths)) > 1 and alike:
        log.warning(
            "the method asks for weak and for strong views of each image, and here they are alike: nothing goes beyond "
            "crops and flips. Give strong ones more: --aa rand-m9-mstd0.5, or --reprob 0.25."
        )


def _refuse_needs(needs: Needs, why: str) -> None:
    asked = {
        "several augmentations of each image": needs.views, "images of one class together": needs.pairs,
        "to know which image is which": needs.indices, "images set aside": needs.held_out,
    }  # fmt: skip
    if wanted := [words for words, needed in asked.items() if needed]:
        raise DataError(f"the method needs {' and '.join(wanted)}, and {why} another --method (okdc methods).")


def _refuse_stream(settings: DataSettings, needs: Needs) -> None:
    if settings.balanced_sampling:
        raise DataError(
            f"--balanced-sampling picks images by their class, and {settings.data} is a stream, which is only read "
            "from front to back. Unpack it to a folder with train/ and val/, or weigh classes: --class-weights FILE."
        )
    if settings.holdout:
        raise DataError(
            f"--holdout takes single images out of the training data, and {settings.data} is a stream, which is only "
            "read from front to back. Leave it out, or unpack the stream to a folder with train/ and val/."
        )
    _refuse_needs(
        needs,
        f"{settings.data} is a stream, which is only read from front to back. Unpack it to a folder with train/ and "
        "val/, or choose",
    )
