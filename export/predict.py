"""Classify images with the model in this folder; needs numpy, pillow and onnxruntime only.

    python predict.py IMAGE_OR_FOLDER... [--top 5] [--model model.onnx] [--device cuda] [--batch-size 32] [--json]
    cat IMAGE | python predict.py -

With --json, a line for each image, in order: {"image", "predictions": [{"label", "index", "probability"}, ...]}, best
first, or {"image", "error"} for one that cannot be read. Of a network for several labels these are all that are there.
Exit codes: 0 all is well; 1 an image could not be read, the others are answered; 2 wrong use, or the bundle or the
device cannot be used; 3 the model failed on an image.
Or from Python: `predictor = predict.load(folder)`, then `predictor(images)`, where images are PIL images.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_BATCH = 32
_HEIC = (".heic", ".heif")
_STDIN = Path("-")
_ORIENTATION = 0x0112  # the tag of EXIF, and what undoes each of its values but 1, which is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class PredictError(Exception):
    """A file or a device that is missing or cannot be used; the message says which and what to do."""


class ModelError(PredictError):
    """A model that fails on an image."""


def preprocess(image: Image.Image, config: dict[str, Any]) -> np.ndarray:
    """The (C, H, W) float32 input of the network, equal to the last bit to timm's evaluation transform.

    `config` is preprocess.json (input_size (C, H, W), mean, std, interpolation, crop_pct, crop_mode) and okdc.images in
    config.json: the bits that deep images use, and whether photos are turned upright by their EXIF orientation.
    Resizing must stay Pillow's: that of OpenCV or of a tensor library gives other pixels.
    """
    channels, height, width = config["input_size"]
    image = decoded(image, config)
    scale = config.get("crop_pct") or 0.875
    target = math.floor(height / scale), math.floor(width / scale)
    mode = config.get("crop_mode") or "center"
    fill: int | tuple[int, ...] = 0
    if mode == "squash":
        size = target
    elif mode == "border":
        size = _fit(image, target, max)
        values = tuple(round(255 * value) for value in config["mean"])
        fill = values if channels > 1 and len(values) > 1 else values[0]
    elif target[0] == target[1]:
        size = _shorter_side(image, target[0])
    else:
        size = _fit(image, target, min)
    resample = Image.Resampling[config.get("interpolation", "bilinear").upper()]
    image = _center_crop(image.resize(size[::-1], resample), height, width, fill)
    pixels = np.asarray(image, dtype=np.float32).reshape(height, width, channels).transpose(2, 0, 1) / np.float32(255)
    mean, std = (np.asarray(config[key], dtype=np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    return np.ascontiguousarray((pixels - mean) / std)


def decoded(image: Image.Image, config: dict[str, Any]) -> Image.Image:
    """The image as `preprocess` resizes it: upright if it was in training, of 8 bits, grey or RGB."""
    image = _upright(image) if config.get("exif", False) else image
    return _eight_bits(image, config.get("pixel_bits", 16)).convert("L" if config["input_size"][0] == 1 else "RGB")


def load(folder: str | Path, threads: int | None = None, model: str | None = None, device: str = "cpu") -> Predictor:
    """The predictor of a bundle, on its recommended file or on `model`, on cpu, cuda or cuda:1.

    Raises PredictError if a file is missing or broken, or onnxruntime cannot use the device.
    """
    return Predictor(Path(folder), threads, model, device)


class Bundle:
    """The network of a bundle with its labels, and what is known of its images."""

    def __init__(self, folder: Path, threads: int | None = None, model: str | None = None, device: str = "cpu") -> None:
        self.file = model or _recommended(folder)
        if model is not None:
            _check_model(folder, model)
        for name in (self.file, "preprocess.json", "labels.txt"):
            if not (folder / name).is_file():
                raise PredictError(f"{folder} has no {name}: it is not a whole bundle. Copy or export it again.")
        try:
            noted = _noted(folder)
            images = noted.get("images", {})  # how stored images are read
            # Of several labels in one image each has the probability from which on it is said to be there.
            self.thresholds: list[float] | None = noted.get("thresholds")
            self.config: dict[str, Any] = json.loads((folder / "preprocess.json").read_text(encoding="utf-8")) | images
            text = (folder / "labels.txt").read_text(encoding="utf-8")
            self.labels = text.removesuffix("\n").split("\n")  # splitlines would also break a name at U+0085 or U+2028
            self._session = _session(folder / self.file, device, threads)
        except PredictError:
            raise
        except Exception as error:  # onnxruntime's own errors share no base class
            other = "" if device == "cpu" else f", or onnxruntime cannot use {device}"
            raise PredictError(f"The bundle in {folder} is broken{other}: {error}. Copy or export it again.") from error
        channels = self.config["input_size"][0]
        if channels not in (1, 3):
            raise PredictError(
                f"The network takes {channels} channels, not grey or RGB: run model.onnx on your arrays."
            )
        classes = self._session.get_outputs()[0].shape[1]
        if classes != len(self.labels):
            raise PredictError(f"labels.txt names {len(self.labels)} classes and {self.file} has {classes}.")

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Raw outputs (images, classes, ...) for inputs (images, C, H, W); ModelError if that fails."""
        try:
            return self._session.run(None, {self._session.get_inputs()[0].name: inputs})[0]
        except Exception as error:  # onnxruntime's own errors share no base class
            raise ModelError(f"{self.file} fails on {len(inputs)} images at once: {error}") from error


class Predictor(Bundle):
    """The network of a bundle with its preprocessing and labels."""

    def logits(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Raw outputs (images, classes), in batches."""
        outputs = []
        for start in range(0, len(images), _BATCH):
            batch = np.stack([preprocess(image, self.config) for image in images[start : start + _BATCH]])
            outputs.append(self.run(batch))
        return np.concatenate(outputs) if outputs else np.empty((0, len(self.labels)), dtype=np.float32)

    def __call__(self, images: Sequence[Image.Image], top: int | None = None) -> list[list[tuple[str, float]]]:
        """For every image its `top` most likely labels (5) with their probabilities, best first.

        Of a network for several labels: all that are above their thresholds, or the `top` likeliest of these.
        """
        ranked = self.ranked(self.logits(images), top)
        return [[(self.labels[index], odds) for index, odds in best] for best in ranked]

    def ranked(self, logits: np.ndarray, top: int | None = None) -> list[list[tuple[int, float]]]:
        """The same of logits (images, classes), with the numbers of the labels."""
        return _ranked(logits, top or 5) if self.thresholds is None else _above(logits, self.thresholds, top)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(description="Classify images with the model in this folder.")
    parser.add_argument("images", nargs="+", type=_here, metavar="IMAGE_OR_FOLDER", help="- reads one image from stdin")
    parser.add_argument("--top", type=int, help="labels per image (default 5; of several labels all that are there)")
    parser.add_argument("--model", metavar="FILE", help="file of this folder to run (default: the recommended one)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default cpu)")
    parser.add_argument("--batch-size", type=int, default=_BATCH, help=f"images at once (default {_BATCH})")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line")
    given = parser.parse_args(arguments)
    for name in ("top", "batch_size"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(given, name)}")
    try:
        files = [file for path in given.images for file in _files(path)]
        predictor = load(Path(__file__).parent, model=given.model, device=given.device)
    except PredictError as error:
        parser.exit(2, f"{error}\n")
    starts = range(0, len(files), given.batch_size)
    try:
        unread = sum([_answer(predictor, files[start : start + given.batch_size], given) for start in starts])
    except ModelError as error:
        parser.exit(3, f"{error}\n")
    return 1 if unread else 0


def _answer(predictor: Predictor, files: Sequence[Path], given: argparse.Namespace) -> int:
    """Print what is seen in each of the images, run as one batch; returns how many could not be read."""
    read = [_read(file, lambda image: preprocess(image, predictor.config)) for file in files]
    inputs = [each for each in read if not isinstance(each, str)]
    ranked = iter(predictor.ranked(predictor.run(np.stack(inputs)), given.top) if inputs else ())
    for file, each in zip(files, read):
        found: dict[str, Any] = {"error": f"cannot be read as an image: {each}"}
        if not isinstance(each, str):
            best = [(predictor.labels[i], i, odds) for i, odds in next(ranked)]
            found = {"predictions": [dict(zip(("label", "index", "probability"), entry)) for entry in best]}
        if given.json:
            print(json.dumps({"image": str(file)} | found), flush=True)
        elif isinstance(each, str):
            print(f"{file} {found['error']}; it is skipped", file=sys.stderr)
        else:
            print("  ".join([str(file), *(f"{label} {100 * odds:.1f}%" for label, _, odds in best)]), flush=True)
    return len(files) - len(inputs)


def _ranked(logits: np.ndarray, top: int) -> list[list[tuple[int, float]]]:
    """For every row of logits the numbers of its `top` most likely classes with their probabilities, best first."""
    logits = logits.astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    return [[(int(i), float(row[i])) for i in order] for row, order in zip(probabilities, best)]


def _above(logits: np.ndarray, thresholds: Sequence[float], top: int | None) -> list[list[tuple[int, float]]]:
    """For every row of logits the numbers of the labels that are there with their probabilities, likeliest first."""
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    order = np.argsort(-probabilities, axis=1, kind="stable")
    found = [
        [(int(i), float(row[i])) for i in best if row[i] > thresholds[i]] for row, best in zip(probabilities, order)
    ]
    return [best[:top] for best in found]


def _session(file: Path, device: str, threads: int | None) -> Any:
    """An onnxruntime session on the device; PredictError where onnxruntime would use the CPU instead."""
    import onnxruntime

    kind, _, number = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not f"0{number}".isdecimal()):
        raise PredictError(f"There is no device {device!r}: give cpu, cuda or cuda:1.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    provider: tuple[str, dict[str, Any]] = ("CPUExecutionProvider", {})
    if kind == "cuda":
        provider = "CUDAExecutionProvider", {"device_id": number or "0", "use_tf32": "0"}  # float32 means it
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()  # NVIDIA's Python packages, where those are what there is
    session = onnxruntime.InferenceSession(str(file), options, providers=[provider], enable_fallback=0)
    if session.get_providers()[0] != provider[0]:
        raise PredictError(f"onnxruntime cannot use {device}: pip install 'onnxruntime-gpu[cuda,cudnn]', or take cpu.")
    return session


def _recommended(folder: Path) -> str:
    """The file that was fastest where the bundle was verified, of those that were good enough to ship."""
    return Path(_noted(folder).get("model") or "model.onnx").name


def _check_model(folder: Path, model: str) -> None:
    """PredictError for a file that was asked for and is not there, or is not for onnxruntime."""
    if (folder / model).is_file() and model.endswith(".onnx"):
        return
    found = ", ".join(sorted(path.name for path in folder.glob("*.onnx"))) or "none"
    what = "is no ONNX file" if (folder / model).exists() else f"is not in {folder}"
    raise PredictError(f"--model {model}: it {what}. The ONNX files there: {found}.")


def _noted(folder: Path) -> dict[str, Any]:
    """What okdc notes in config.json; nothing in an older bundle, or a folder put together by hand."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))["okdc"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _here(given: str) -> Path:
    """The path, and not the address of something elsewhere."""
    if "://" in given:
        raise argparse.ArgumentTypeError(f"{given} is an address: download the image, and give its path")
    return Path(given)


def _files(path: Path) -> list[Path]:
    """The image itself, or all images in a folder and below."""
    if path == _STDIN or path.is_file():
        return [path]
    if not path.is_dir():
        raise PredictError(f"There is no image or folder {path}.")
    known = {*Image.registered_extensions(), *_HEIC}
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in known)
    if not found:
        raise PredictError(f"The folder {path} holds no images (such as .jpg or .png).")
    return found


def _read(file: Path, take: Callable[[Image.Image], Any]) -> Any:
    """What `take` makes of the image, or a text that says why there is nothing."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()  # a package of its own, for photos of phones
    try:
        with Image.open(io.BytesIO(sys.stdin.buffer.read()) if file == _STDIN else file) as image:
            return take(image)
    except UnidentifiedImageError:
        heic = file.suffix.lower() in _HEIC
        return "HEIC needs a decoder: pip install pillow-heif" if heic else "it is of no known format"
    except Exception as error:  # Pillow's decoders raise nearly anything
        return str(error) or type(error).__name__


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """The image as it can be converted: of whole numbers of `bits` bits the upper 8 (Pillow would clip to white)."""
    if image.mode == "F":
        raise PredictError("An image of floating-point numbers has no known range: save it with 8 or 16 bits.")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # the colours are those of a direct conversion, of which Pillow warns
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() >= 2**bits:
        raise PredictError(
            f"Its values go from {pixels.min()} to {pixels.max()}; the network was trained on 0 to {2**bits - 1}."
        )
    return Image.fromarray(((pixels << 8) >> bits).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says that it is seen; as stored where that says nothing or cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # malformed EXIF data of a photo that is whole: Pillow's parser raises nearly anything
        return image
    # Not ImageOps.exif_transpose, which also writes the other tags anew and fails where one is malformed.
    return image if turn is None else image.transpose(turn)


def _shorter_side(image: Image.Image, side: int) -> tuple[int, int]:
    """(height, width) with the shorter of the two equal to `side`."""
    longer = int(side * max(image.size) / min(image.size))
    return (longer, side) if image.width <= image.height else (side, longer)


def _fit(image: Image.Image, target: tuple[int, int], choose: Any) -> tuple[int, int]:
    """(height, width) scaled to the target by the larger (`max`) or the smaller (`min`) of the two ratios."""
    ratio = choose(image.height / target[0], image.width / target[1])
    return round(image.height / ratio), round(image.width / ratio)


def _center_crop(image: Image.Image, height: int, width: int, fill: int | tuple[int, ...]) -> Image.Image:
    """The middle (height, width) of the image, which is first padded where it is smaller."""
    across, down = max(width - image.width, 0), max(height - image.height, 0)
    if across or down:
        image = ImageOps.expand(image, (across // 2, down // 2, (across + 1) // 2, (down + 1) // 2), fill=fill)
    left, top = round((image.width - width) / 2.0), round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _leave(run: Callable[[], int]) -> None:
    """Run a command line, and end with its exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names need not be text
    try:
        sys.exit(run())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the answers has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    _leave(main)
