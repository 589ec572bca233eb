"""Find key points on images with the model in this folder; needs numpy, pillow and onnxruntime only.

    python predict.py IMAGE_OR_FOLDER... [--box X,Y,WIDTH,HEIGHT] [--draw FOLDER] [--model model.onnx] [--json]
    cat IMAGE | python predict.py - --draw .

Points are in pixels of the whole image, the middle of the first being 0, 0; a confidence is the height of a heat map's
peak, about 1 where the network is sure. With --json, a line for each image, in order: {"image", "points": [{"name",
"x", "y", "confidence"}, ...]}, or {"image", "error"} for one that cannot be read. With --draw, FOLDER gets
NAME.points.png for each image, with the points whose confidence is 0.1 or more.
Exit codes: 0 all is well; 1 an image could not be read, the others are answered; 2 wrong use, or the bundle or the
device cannot be used; 3 the model failed on an image.
Or from Python: `predictor = predict.load(folder)`, then `predictor(images, box)`, where images are PIL images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# What tasks have in common; in a bundle it stands in the place of its import (okdc.system.shipped.program).
from predict import _BATCH, _STDIN, Bundle, ModelError, PredictError, _files, _here, _leave, _read, decoded

_DRAWN = 0.1  # the confidence from which on a point is drawn
_HUES = ("#e6443c", "#2f7ed8", "#2ca05a", "#e8a317", "#8e5bc0", "#17b3b3")


def fitted(box: Sequence[float], size: tuple[int, int], margin: float) -> np.ndarray:
    """The map (2, 3) from pixels of an image to those of an input of (height, width), with a box in its middle."""
    x, y, width, height = box
    scale = min(size[1] / width, size[0] / height) / margin
    to = (size[1] - 1) / 2 - scale * (x + width / 2), (size[0] - 1) / 2 - scale * (y + height / 2)
    return np.array([[scale, 0, to[0]], [0, scale, to[1]]])


def cropped(image: Image.Image, matrix: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """What the map makes of an image, of (height, width), black where it has nothing; as in training.

    Before it is made smaller by a half or more its pixels are averaged in blocks.
    """
    scale = float(matrix[0, 0])
    block = int(1 / scale)
    # Pillow's coordinates begin at the corner of the first pixel.
    across, down = (-matrix[:, 2] / scale + 0.5 - 0.5 / scale).tolist()
    step = 1 / scale
    if block > 1:
        image = image.reduce(block)
        step, across, down = step / block, across / block, down / block
    data = (step, 0.0, across, 0.0, step, down)
    return image.transform((size[1], size[0]), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)


def decode(maps: np.ndarray, stride: Sequence[float], official: bool = False) -> np.ndarray:
    """Points (N, K, 3) of heat maps (N, K, h, w): x and y in pixels of the input, and the height of the peak.

    A map's pixel u is at (u + 0.5) * stride - 0.5; between pixels a peak is where the parabola through the logarithms
    has it, which is exact for a Gaussian. Official: at u * stride, a quarter of a pixel towards the larger neighbour.
    """
    height, width = maps.shape[2:]
    flat = maps.reshape(*maps.shape[:2], -1)
    place = flat.argmax(-1)
    score = np.take_along_axis(flat, place[..., None], 2)[..., 0]
    peaks = place % width, place // width
    found = []
    for axis, (length, step) in enumerate(((width, 1), (height, width))):
        margin = 2 if official else 1
        inside = (peaks[axis] >= margin) & (peaks[axis] < length - 1)
        near = [np.where(inside, place + d * step, place) for d in (-1, 0, 1)]
        values = [np.take_along_axis(flat, each[..., None], 2)[..., 0] for each in near]
        if official:
            other = peaks[1 - axis]  # pixels beside the border count as the border, of both axes
            inside = inside & (other >= margin) & (other < (height, width)[axis] - 1)
            shift = 0.25 * np.sign(values[2] - values[0])
            found.append((peaks[axis] + np.where(inside, shift, 0)) * stride[axis] * (score > 0))
        else:
            shift = np.where(inside & (score > 0), _summit(*values), 0)
            found.append((peaks[axis] + shift + 0.5) * stride[axis] - 0.5)
    return np.stack([*found, score], -1)


def _summit(before: np.ndarray, at: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where the parabola through three logarithms is highest, from the middle one, in pixels."""
    floor = np.maximum(1e-3 * at, np.finfo(np.float32).tiny)  # what is lower is noise, and would decide
    low, top, high = (np.log(np.maximum(each, floor)) for each in (before, at, after))
    bend = low - 2 * top + high
    shift = 0.5 * (low - high) / np.where(bend < 0, bend, -1.0)
    return np.where(bend < 0, shift.clip(-0.5, 0.5), 0)


def drawn(image: Image.Image, points: np.ndarray, skeleton: Sequence[Sequence[int]]) -> Image.Image:
    """A copy of an image with points (K, 3) on it and lines between those that the skeleton connects."""
    image = image.convert("RGB")
    draw, size = ImageDraw.Draw(image), max(2, round(max(image.size) / 150))
    seen = points[:, 2] >= _DRAWN
    for i, j in skeleton:
        if seen[i] and seen[j]:
            draw.line([tuple(points[i, :2]), tuple(points[j, :2])], "#ffffff", max(1, size // 2))
    for k, (x, y) in enumerate(points[:, :2].tolist()):
        if seen[k]:
            draw.ellipse((x - size, y - size, x + size, y + size), _HUES[k % len(_HUES)], "#ffffff")
    return image


def load(folder: str | Path, threads: int | None = None, model: str | None = None, device: str = "cpu") -> Predictor:
    """The predictor of a bundle, on its recommended file or on `model`, on cpu, cuda or cuda:1.

    Raises PredictError if a file is missing or broken, or onnxruntime cannot use the device.
    """
    return Predictor(Path(folder), threads, model, device)


class Predictor(Bundle):
    """The network of a bundle with its preprocessing and its key points."""

    def __init__(self, folder: Path, threads: int | None = None, model: str | None = None, device: str = "cpu") -> None:
        super().__init__(folder, threads, model, device)
        try:
            text = (folder / "keypoints.json").read_text(encoding="utf-8")
            self.keypoints: dict[str, Any] = json.loads(text)
            stride = self.keypoints["stride"]
            self.stride = stride if isinstance(stride, list) else [stride, stride]  # across and down
            self.official = self.keypoints["decoding"] == "official"
            self.names, self.skeleton = self.keypoints["names"], self.keypoints["skeleton"]
            self.given, self.margin = self.keypoints["boxes"] == "given", self.keypoints["margin"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PredictError(
                f"{folder} has no keypoints.json that can be used ({error}): copy or export it again."
            ) from error

    def __call__(self, images: Sequence[Image.Image], box: Sequence[float] | None = None) -> np.ndarray:
        """Points (images, K, 3): x and y in pixels of each image, upright if it was in training, and confidences.

        `box` (x, y, width, height) says where to look; without it that is the whole image, without a margin.
        """
        batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        found = [self.points([decoded(image, self.config) for image in batch], box) for batch in batches]
        return np.concatenate(found) if found else np.empty((0, len(self.names), 3))

    def points(self, images: Sequence[Image.Image], box: Sequence[float] | None = None) -> np.ndarray:
        """The same of images that are `decoded`, as one batch."""
        size = (self.config["input_size"][1], self.config["input_size"][2])
        margin = 1.0 if box is None and self.given else self.margin
        matrices = [fitted(box or (-0.5, -0.5, *image.size), size, margin) for image in images]
        inputs = np.stack([self._input(cropped(*each, size)) for each in zip(images, matrices)])
        found = decode(self.run(inputs).astype(np.float64), self.stride, self.official)
        there = np.stack(matrices)[:, None]
        found[..., :2] = (found[..., :2] - there[..., :, 2]) / there[..., :1, 0]
        return found

    def logits(self, images: Sequence[tuple[Image.Image, Sequence[float]]]) -> np.ndarray:
        """Heat maps (images, K, h, w) of images, each with the box that it is cropped to, as those of training."""
        size = (self.config["input_size"][1], self.config["input_size"][2])
        crops = [cropped(decoded(image, self.config), fitted(box, size, self.margin), size) for image, box in images]
        return self.run(np.stack([self._input(crop) for crop in crops]))

    def _input(self, crop: Image.Image) -> np.ndarray:
        channels = self.config["input_size"][0]
        pixels = np.asarray(crop, dtype=np.float32).reshape(*crop.size[::-1], channels).transpose(2, 0, 1)
        mean, std = (np.asarray(self.config[key], dtype=np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
        return np.ascontiguousarray((pixels / np.float32(255) - mean) / std)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(description="Find key points on images with the model in this folder.")
    parser.add_argument("images", nargs="+", type=_here, metavar="IMAGE_OR_FOLDER", help="- reads one image from stdin")
    parser.add_argument("--box", type=_box, metavar="X,Y,WIDTH,HEIGHT", help="where to look (default: everywhere)")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="write NAME.points.png of each image there")
    parser.add_argument("--model", metavar="FILE", help="file of this folder to run (default: the recommended one)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default cpu)")
    parser.add_argument("--batch-size", type=int, default=_BATCH, help=f"images at once (default {_BATCH})")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line")
    given = parser.parse_args(arguments)
    if given.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, not {given.batch_size}")
    try:
        files = [file for path in given.images for file in _files(path)]
        if given.draw:
            _prepare(given.draw, files)
        predictor = load(Path(__file__).parent, model=given.model, device=given.device)
    except PredictError as error:
        parser.exit(2, f"{error}\n")
    if predictor.given and given.box is None:
        print("The network has learned from boxes and looks at whole images now: --box says where.", file=sys.stderr)
    starts = range(0, len(files), given.batch_size)
    try:
        unread = sum([_answer(predictor, files[start : start + given.batch_size], given) for start in starts])
    except ModelError as error:
        parser.exit(3, f"{error}\n")
    return 1 if unread else 0


def _answer(predictor: Predictor, files: Sequence[Path], given: argparse.Namespace) -> int:
    """Print, and draw, what is found on each of the images, run as one batch; returns how many could not be read."""
    read = [_read(file, lambda image: decoded(image, predictor.config)) for file in files]
    images = [each for each in read if not isinstance(each, str)]
    found = iter(predictor.points(images, given.box) if images else ())
    for file, image in zip(files, read):
        if isinstance(image, str):
            problem = f"cannot be read as an image: {image}"
            if given.json:
                print(json.dumps({"image": str(file), "error": problem}), flush=True)
            else:
                print(f"{file} {problem}; it is skipped", file=sys.stderr)
            continue
        points = next(found)
        if given.draw:
            drawn(image, points, predictor.skeleton).save(given.draw / _drawing(file))
        named = [(name, *each) for name, each in zip(predictor.names, points.tolist())]
        if given.json:
            told = [dict(zip(("name", "x", "y", "confidence"), each)) for each in named]
            print(json.dumps({"image": str(file), "points": told}), flush=True)
        else:
            words = [f"{name} {x:.1f},{y:.1f} ({odds:.2f})" for name, x, y, odds in named]
            print("  ".join([str(file), *words]), flush=True)
    return len(files) - len(images)


def _box(given: str) -> list[float]:
    """The four numbers of a box."""
    with contextlib.suppress(ValueError):
        box = [float(number) for number in given.split(",")]
        if len(box) == 4 and all(map(math.isfinite, box)) and min(box[2:]) > 0:
            return box
    raise argparse.ArgumentTypeError(f"{given} is no box: give X,Y,WIDTH,HEIGHT in pixels, such as 10,20,200,150")


def _drawing(file: Path) -> str:
    """What the picture of an image is called."""
    return f"{'stdin' if file == _STDIN else file.stem}.points.png"


def _prepare(folder: Path, files: Sequence[Path]) -> None:
    """Make the folder for pictures; PredictError where two of them would be called the same, or it cannot be made."""
    names = [_drawing(file) for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise PredictError(f"--draw {folder}: several images would become {twice}. Give their folders one by one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PredictError(f"--draw {folder}: this folder cannot be made ({error.strerror}).") from error


if __name__ == "__main__":
    _leave(main)
