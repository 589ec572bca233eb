"""Photos that were stored as the sensor saw them are turned upright, everywhere alike."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_dataset

import okdc
from okdc.data import Data, load, open_source
from okdc.data.streams import Stream, StreamImages, StreamValidation
from okdc.data.transforms import preprocessing, read, upright
from okdc.deploy import calibration
from okdc.recipe import DataSettings
from okdc.system import shipped
from tests.helpers.images import CONFIG, same
from tests.helpers.networks import Tiny

ASIDE = 6  # the camera was held upright and its sensor lies: shown turned clockwise
predict = shipped.load(shipped.folder("export") / "predict.py")


def tagged(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def photos(root: Path, kind: str, mode: str = "RGB") -> Path:
    """Noise, `tagged` as lying on its side, with what it then shows as `turned` copies, or `bare` of the tag."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for cls in ("a", "b"):
            (root / split / cls).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)
                image = image.transpose(Image.Transpose.ROTATE_270) if kind == "turned" else image
                image.save(root / split / cls / f"{i}.png", **({"exif": tagged(ASIDE)} if kind == "tagged" else {}))
    return root


def loaded(root: Path, **changes: Any) -> Data:
    given = replace(DataSettings(data=str(root), workers=0), **changes)
    return load(open_source(given, 7), given, CONFIG, batch_size=8, validation_batch_size=8, seed=7, device="cpu")


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: photos(tmp_path_factory.mktemp(kind), kind) for kind in ("tagged", "turned", "bare")}


@pytest.mark.parametrize("resident", ["on", "off"])
@pytest.mark.parametrize(("exif", "alike"), [(True, "turned"), (False, "bare")])
def test_the_same_pixels_in_training_validation_calibration_and_predict(
    roots: dict[str, Path], exif: bool, alike: str, resident: str
) -> None:
    ours, theirs = loaded(roots["tagged"], exif=exif, resident=resident), loaded(roots[alike], resident=resident)
    assert ours.preprocess.get("exif", False) is exif and ("exif" in ours.preprocess) is exif
    assert same(ours.train.batches(0), theirs.train.batches(0)) and same(ours.validation, theirs.validation)
    ((seen, _),) = ours.validation or ()
    raw = [predict.preprocess(image, ours.preprocess) for image, _ in ours.validation_images or ()]
    np.testing.assert_allclose(np.stack(raw), seen.numpy(), atol=1e-6)
    drawn = [calibration.draw(data, 16)[1]["sha256"] for data in (ours, theirs)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("turn", [upright, predict._upright])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_pillows(tmp_path: Path, orientation: int, turn: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.png", "a.webp", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name, exif=tagged(orientation))
        with Image.open(tmp_path / name) as image:
            image.load()
        assert np.array_equal(turn(image), ImageOps.exif_transpose(image)), name


@pytest.mark.parametrize("turn", [upright, predict._upright])
def test_exif_data_that_cannot_be_read_costs_no_photo(turn: Any) -> None:
    for broken in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"no such thing"):
        image = Image.new("L", (4, 3))
        image.info["exif"] = broken
        assert turn(image) is image
    # The resolution as letters: of that photo ImageOps.exif_transpose raises a TypeError.
    tags = struct.pack("<HHHIIHHIII", 2, 0x0112, 3, 1, ASIDE, 0x011A, 2, 4, 0x41414141, 0)
    image = Image.new("L", (4, 3))
    image.info["exif"] = b"Exif\0\0II*\0\x08\0\0\0" + tags
    assert turn(image).size == (3, 4)


def test_deep_images_are_turned_too(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    for split in ("train", "val"):
        for cls in ("a", "b"):
            (tmp_path / split / cls).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(values).save(tmp_path / split / cls / f"{i}.png", exif=tagged(ASIDE))
    source = open_source(DataSettings(data=str(tmp_path)), 7)
    found = read(source.train, 0, CONFIG | {"exif": True, "pixel_bits": 16}, [])
    assert found and np.array_equal(found.convert("L"), np.rot90(values >> 8, -1))
    config = CONFIG | {"exif": True, "crop_pct": 1.0}
    turned = predict.preprocess(Image.fromarray(np.rot90(values, -1)), config)
    shown = predict._read(Path(source.train.name(0)), lambda image: predict.preprocess(image, config))
    assert np.array_equal(shown, turned)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_streams_are_turned_before_they_are_cropped(roots: dict[str, Path]) -> None:
    settings = DataSettings(workers=1)
    batches = {}
    for kind in ("tagged", "turned"):  # timm leaves the files of its raw images for the collector to close
        stream = Stream(lambda _, kind=kind: create_dataset("", str(roots[kind] / "val")))
        config = preprocessing(settings, CONFIG)
        ((batches[kind], _),) = StreamValidation(stream, settings, config, 8, torch.device("cpu"))
        raw = np.stack([predict.preprocess(image, config) for image, _ in StreamImages(stream)])
        np.testing.assert_allclose(raw, batches[kind].numpy(), atol=1e-6)
    assert torch.equal(batches["tagged"], batches["turned"])


def test_the_bundle_keeps_it_and_a_run_goes_on_as_it_began(
    roots: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"method": "baseline", "data": str(roots["tagged"]), "img_size": 32, "workers": 0, "batch_size": 8}
    given |= {"output": tmp_path, "batch_sizes": [1]}
    new = okdc.compress("resnet20_cifar", epochs=1, onnx=False, **given)
    assert json.loads((new.path / "student.json").read_text())["preprocess"]["exif"] is True
    okdc.compress("resnet20_cifar", epochs=1, exif=False, onnx=False, experiment="old", **given)
    old = tmp_path / "old"
    recipe = (old / "recipe.yaml").read_text()
    assert "  exif: false\n" in recipe
    (old / "recipe.yaml").write_text(recipe.replace("  exif: false\n", ""))  # as it was written before the setting
    again = okdc.compress("resnet20_cifar", epochs=2, onnx=False, experiment="old", resume="auto", **given)
    assert "goes on as it began, with --no-exif" in caplog.text and not again.recipe.data.exif
    (old / "recipe.yaml").write_text(recipe.replace("  exif: false\n", ""))
    assert okdc.export(old, batch_sizes=[1])["verdict"] == "pass"  # predict.py sees the images that torch sees
    assert "images" not in json.loads((old / "export" / "config.json").read_text())["okdc"]


def test_a_loader_of_ones_own_has_no_such_setting(tmp_path: Path) -> None:
    batches = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)]
    given = {"method": "baseline", "output": tmp_path, "experiment": "own", "onnx": False}
    okdc.compress(Tiny(), batches, epochs=1, **given)
    okdc.compress(Tiny(), batches, epochs=2, resume="auto", **given)
    assert "exif" not in json.loads((tmp_path / "own" / "student.json").read_text())["preprocess"]
