"""How the images of a user's own loader become inputs: read from its transform, or said by the user and checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from okdc.data import own_images
from okdc.data.own_images import OwnImages
from okdc.data.values import Batch, log
from okdc.errors import DataError

SLACK = 0.02  # of the range of pixels: resized tensors overshoot a little
DEFAULTS = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}


def preprocessing(
    loader: Any, batch: Batch, given: dict[str, Any], evaluates: bool
) -> tuple[dict[str, Any], OwnImages | None]:
    """The preprocessing of a loader, and its images raw where both are known; input_size alone where nothing is.

    batch: its first. given: mean and std, perhaps interpolation and crop_pct, of which the last two are taken to be
    bilinear and 1 where they are left out, which `assumed` lists. Raises DataError where the batch contradicts them;
    only one that `evaluates` does to images what predict.py is to do.
    """
    size: tuple[int, ...] = tuple(batch[0].shape[1:])
    raw = own_images.raw_images(loader)
    read = own_images.read_transform(loader, size) if raw else None
    if raw and read and (off := own_images.difference(raw, batch, read)) is not None and off <= own_images.LEVELS:
        return agreed(read, given, "the loader's own transform says"), raw
    if not given:
        _tell_whole_numbers(batch[0])
        return {"input_size": size}, None
    config = complete({"input_size": size}, given)
    _check_pixels(batch[0], *(torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std")))
    off = own_images.difference(raw, batch, config) if raw and evaluates else None
    if off is not None and off > own_images.LEVELS:
        raise DataError(
            f"mean, std, interpolation and crop_pct do not say what the validation loader does: prepared by "
            f"{_words(config)}, its first images differ from what it gives by up to {off:.0f} of 255 levels. Look at "
            "its transform, and give what it does; leave all four out where they cannot say it."
        )
    return config, raw if off is not None else None


def complete(known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A preprocessing of which the input_size (C, H, W) alone is known, with what is given of the rest.

    Raises DataError unless mean and std are given, one number or one for each channel.
    """
    channels = known["input_size"][0]
    if missing := [name for name in ("mean", "std") if name not in given]:
        raise DataError(
            f"{' and '.join(missing)} not given beside {' and '.join(given)}; expected mean and std together: pixels "
            "from 0 to 1 become (x - mean) / std, for example mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]."
        )
    for name in ("mean", "std"):
        if len(given[name]) not in (1, channels):
            raise DataError(f"{name} has {len(given[name])} numbers, and the images have {channels} channels.")
    values = {name: tuple(given[name]) * (channels // len(given[name])) for name in ("mean", "std")}
    assumed = [name for name in ("interpolation", "crop_pct") if name not in given]
    return known | DEFAULTS | given | values | ({"assumed": assumed} if assumed else {})


def agreed(known: dict[str, Any], given: dict[str, Any], who: str) -> dict[str, Any]:
    """What is known of a preprocessing, with what is `given` where that was assumed; DataError where they differ.

    who: in words, how the other is known, such as "the loader's own transform says".
    """
    assumed = known.get("assumed", ())
    for name, value in given.items():
        same = value == known[name] if isinstance(value, str) else np.allclose(value, known[name])
        if not same and name not in assumed:
            raise DataError(f"{name} is given as {value}, and {who} {known[name]}: leave it out.")
    filled = {name: given[name] for name in assumed if name in given}
    left = [name for name in assumed if name not in given]
    known = {key: value for key, value in known.items() if key != "assumed"}
    return known | filled | ({"assumed": left} if left else {})


def _check_pixels(images: Tensor, mean: Tensor, std: Tensor) -> None:
    """DataError where images (B, C, H, W) cannot be pixels from 0 to 1 of which `mean` was taken, divided by `std`."""
    low, high = (0 - mean) / std, (1 - mean) / std
    pixels = images.cpu().movedim(1, 0).flatten(1)
    least, most = (each.view(-1, 1, 1) for each in (pixels.amin(1), pixels.amax(1)))
    slack = SLACK * (high - low)
    if (least < low - slack).any() or (most > high + slack).any():
        channel = int(torch.maximum((low - least) / (high - low), (most - high) / (high - low)).flatten().argmax())
        whole = " They are whole numbers, as before any normalisation." if _are_whole(images) else ""
        raise DataError(
            f"mean and std do not say what the loader does: with {mean.flatten().tolist()} and "
            f"{std.flatten().tolist()} channel {channel} goes from {float(low[channel]):.3g} to "
            f"{float(high[channel]):.3g}, and the loader's first batch from {float(least[channel]):.3g} to "
            f"{float(most[channel]):.3g}.{whole} Give those that its transform has."
        )
    one_sided = ((least >= 0) & (mean > 0.05)).all() or ((most <= 0) & (mean < 0.95)).all()
    if one_sided and (least < most).any():
        raise DataError(
            f"mean and std do not say what the loader does: no pixel of its first batch is "
            f"{'darker' if (least >= 0).all() else 'brighter'} than the mean {mean.flatten().tolist()}. Is there a "
            "Normalize in its transform? If not: mean=[0], std=[1]."
        )
    for channel, values in enumerate(pixels):
        _check_steps(values, channel, float(mean[channel]), float(std[channel]))


def _check_steps(values: Tensor, channel: int, mean: float, std: float) -> None:
    """DataError where the pixels of a channel are 8 bits wide, and mean and std put them between whole levels.

    Only pixels over more than half of such a range show it: then no larger step than one level fits in.
    """
    distinct = values.double().unique()
    if not 64 < len(distinct) <= 256:
        return
    span = float(distinct[-1] - distinct[0])
    count = round(span / float(distinct.diff().quantile(0.1)))
    places = (distinct - distinct[0]) / span * count
    if not 128 < count < 256 or (places - places.round()).abs().max() > 0.05:
        return
    step = span / count
    levels = 1 / (step * std)  # from black to white
    black = (float(distinct[0]) * std + mean) * levels
    if max(abs(levels - round(levels)), abs(black - round(black))) > 0.2:
        raise DataError(
            f"mean and std do not say what the loader does: channel {channel} of its first batch goes in steps of "
            f"{step:.4g} from {float(distinct[0]):.4g}, and by mean {mean:.4g} and std {std:.4g} its pixels of 8 bits "
            f"lie between whole levels. If its darkest is black, mean is {-float(distinct[0]) / step / 255:.4g} and "
            f"std {1 / (255 * step):.4g}. Give those that its transform has."
        )


def _tell_whole_numbers(images: Tensor) -> None:
    if _are_whole(images):
        log.warning(
            "the loader gives whole numbers up to %d, as before any normalisation; if they go on to 255, say so for "
            "the bundle: mean=[0], std=[%.8f]", int(images.max()), 1 / 255,
        )  # fmt: skip


def _are_whole(images: Tensor) -> bool:
    return bool(images.max() > 2 and (images == images.round()).all())


def _words(config: dict[str, Any]) -> str:
    return ", ".join(f"{key} {config[key]}" for key in ("mean", "std", "interpolation", "crop_pct"))
