"""model.full.onnx answers for decoded images of any size as predict.py does, to one grey level of a pixel."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from okdc import deploy
from okdc.cli import run_commands
from okdc.deploy import targets
from okdc.errors import ExportError
from okdc.recipe import ExportSettings
from okdc.system import shipped
from tests.export.test_predict import IMAGENET, photo
from tests.helpers.networks import Tiny

predict = shipped.load(shipped.folder("export") / "predict.py")
full = targets.find("onnx_full").module
SIZES = [(1, 1), (17, 9), (33, 57), (57, 33), (64, 200), (301, 97), (35, 36), (224, 31)]


def write(folder: Path, config: dict, opset: int = 20) -> Path:
    """model.full.onnx of a network whose logits are its input, so that every pixel is seen."""
    size = config["input_size"]
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["logits"])],
        "pixels",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", math.prod(size)])],
    )
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(network, folder / "model.onnx")
    full.write(None, None, folder / "model.full.onnx", onnx=folder / "model.onnx", preprocess=config)
    return folder / "model.full.onnx"


@pytest.mark.parametrize(
    ("size", "mode", "crop_pct"),
    [
        ([3, 32, 32], "center", 0.875), ([3, 31, 31], "center", 1.0), ([3, 48, 32], "center", 0.9),
        ([3, 31, 47], "squash", 0.95), ([1, 28, 28], "center", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_pixel_is_that_of_predict_py(tmp_path, size, mode, crop_pct, interpolation):
    config = {"input_size": size, "interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": mode, **IMAGENET}
    if size[0] == 1:
        config |= {"mean": [0.5], "std": [0.25]}
    run = full.runner(write(tmp_path, config), threads=1)
    level = 1 / 255 / min(config["std"])
    off, count = 0, 0
    for each in SIZES:
        image = predict.decoded(photo(each), config)
        given = run(np.asarray(image).reshape(1, each[1], each[0], size[0]))
        difference = np.abs(given.reshape(size) - predict.preprocess(image, config))
        assert difference.max() <= 1.01 * level, each
        off, count = off + int((difference > 1e-6).sum()), count + difference.size
    assert off / count < 0.1, "these are not two ways of rounding"
    assert run.provider == "CPUExecutionProvider"


def test_it_ends_in_probabilities_of_a_batch_of_one_size(tmp_path):
    config = {"input_size": [3, 8, 8], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center", **IMAGENET}
    session = onnxruntime.InferenceSession(str(write(tmp_path, config)), providers=["CPUExecutionProvider"])
    images = np.stack([np.asarray(photo((20, 30)).rotate(90 * i)) for i in range(3)])
    assert [each.type for each in session.get_inputs()] == ["tensor(uint8)"]
    assert session.get_inputs()[0].shape == ["batch", "height", "width", 3]
    odds, logits = session.run(None, {"images": images})
    assert odds.shape == logits.shape == (3, 192) and np.allclose(odds.sum(1), 1)
    assert np.allclose(odds, torch.softmax(torch.from_numpy(logits), 1).numpy())
    alone = np.concatenate([session.run(["logits"], {"images": image[None]})[0] for image in images])
    assert np.array_equal(alone, logits)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"interpolation": "lanczos"}, "resized by 'lanczos', which ONNX cannot: bilinear and bicubic only"),
        ({"crop_mode": "border"}, "crop_mode 'border' with crop_pct 1 adds borders"),
        ({"crop_pct": 1.1}, "crop_mode 'center' with crop_pct 1.1 adds borders"),
    ],
)
def test_what_it_cannot_do_as_training_did_is_refused(tmp_path, changes, reason):
    config = {"input_size": [3, 8, 8], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center", **IMAGENET}
    with pytest.raises(NotImplementedError, match=reason):
        write(tmp_path, config | changes)
    assert not (tmp_path / "model.full.onnx").exists()


def test_an_opset_that_cannot_resize_so_is_refused(tmp_path):
    config = {"input_size": [3, 8, 8], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center", **IMAGENET}
    with pytest.raises(NotImplementedError, match=r"needs opset 18 or newer, and model\.onnx has 17"):
        write(tmp_path, config, opset=17)


def test_where_it_cannot_be_written_the_rest_ships(tmp_path):
    config = {"input_size": (3, 16, 16), "interpolation": "lanczos", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    settings = ExportSettings(embed_preprocess=True, batch_sizes=[])
    known = {"arch": "Tiny", "preprocess": config, "classes": tuple("abcd")}
    verification = deploy.export_bundle(Tiny().eval(), None, settings, tmp_path / "x", **known)
    assert verification["verdict"] == "parity_only" and (tmp_path / "x" / "model.onnx").exists()
    assert not (tmp_path / "x" / "model.full.onnx").exists()
    with pytest.raises(ExportError, match="no embed_preprocess file was written: the images are resized by 'lanczos'"):
        run_commands.require_asked(verification, {"embed_preprocess": True})


def test_grey_and_deep_images_are_decoded_before():
    config = {"input_size": [3, 8, 8], "exif": True, "pixel_bits": 16, **IMAGENET}
    deep = Image.fromarray(np.full((4, 6), 40_000, dtype=np.uint16))
    assert np.asarray(predict.decoded(deep, config)).tolist() == np.full((4, 6, 3), 40_000 >> 8).tolist()
