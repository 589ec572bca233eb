"""Pictures of single images in the report: as a network saw them, small enough to lie in the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from okdc.report.words import percent

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SIDE = 160  # pixels of the longer side of a picture

_TITLES = {
    "right": "Most clearly right", "wrong": "Most clearly wrong",
    "gained": "Right where the baseline is wrong", "lost": "Wrong where the baseline is right",
}  # fmt: skip
_NONE = {
    "right": "The student is right on no image.", "wrong": "The student is wrong on no image.",
    "gained": "The student is right on no image where the baseline is wrong.",
    "lost": "The student is wrong on no image where the baseline is right.",
}  # fmt: skip


def view(examples: Mapping[str, Any] | None, several: bool) -> dict[str, Any] | None:
    """The examples of a run (`okdc.pipeline.examples`) as the template shows them; None where there are none.

    several: whether an image may have several labels.
    """
    if not examples:
        return None
    groups = [
        {"title": title, "rows": [row | {"words": _words(row)} for row in examples["groups"].get(name) or ()]}
        for name, title in _TITLES.items()
    ]
    return {"groups": [group for group in groups if group["rows"]], "note": _note(examples, several)}


def _words(row: Mapping[str, Any]) -> str:
    """What a picture shows, for whoever does not see it."""
    text = f"Its label is {_listed(row['truth'])}; the student says {_answer(row['said'])}"
    return text + (f"; the baseline says {_answer(row['control'])}." if row["control"] is not None else ".")


def _answer(said: list[tuple[str, float]]) -> str:
    return _listed([f"{name} ({percent(odds)})" for name, odds in said])


def _listed(words: list[str]) -> str:
    return ", ".join(words) or "no label"


def _note(examples: Mapping[str, Any], several: bool) -> str:
    told = ["Below each image stands its label, and then what the student says, with the probability that it gives."]
    if several:
        told.append("The student is right where it says all labels of an image and no other.")
    if examples["normalised"]:
        told.append("Nobody said how your loader normalises images, so each is stretched from black to white.")
    if examples["channels"] not in (1, 3):
        shown = "the first three are" if examples["channels"] > 3 else "the first is"
        told.append(f"Of {examples['channels']} channels {shown} shown.")
    told += [text for name, text in _NONE.items() if examples["groups"].get(name) == []]
    return " ".join(told)


def unnormalised(image: Tensor, preprocess: Mapping[str, Any]) -> Image.Image:
    """The picture of a network's input (C, H, W), by `mean` and `std` of its preprocessing.

    Where these are not known it is stretched from its least value to its largest. Of other than one or three channels
    the first three are shown, or the first.
    """
    from PIL import Image

    pixels = image.detach().float().cpu().numpy()
    if "mean" in preprocess:
        mean, std = (_each(preprocess[key], len(pixels)) for key in ("mean", "std"))
        pixels = pixels * std + mean
    else:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = (pixels - low) / ((high - low) or 1.0)
    pixels = (255 * pixels[: 3 if len(pixels) >= 3 else 1].clip(0, 1)).round().astype("uint8")
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _each(values: Any, channels: int) -> Any:
    """One value for each channel, (C, 1, 1)."""
    import numpy as np

    return np.broadcast_to(np.asarray(values, dtype=np.float32).reshape(-1, 1, 1), (channels, 1, 1))


def picture(image: Image.Image, side: int = SIDE) -> str:
    """A JPEG in base64, its longer side at most `side` pixels; pixels of small images are repeated, to be seen."""
    from PIL import Image

    longer = max(image.size)
    if longer > side:
        size = (max(1, round(image.width * side / longer)), max(1, round(image.height * side / longer)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    elif (times := side // longer) > 1:
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    held = io.BytesIO()
    image.save(held, "JPEG", quality=85)
    return base64.b64encode(held.getvalue()).decode("ascii")
