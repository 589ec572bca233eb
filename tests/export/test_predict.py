"""predict.py sees the pixels that timm's evaluation transform sees, and runs where torch does not."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnxruntime
import PIL
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from okdc.data.transforms import convert
from okdc.deploy import targets
from okdc.system import shipped

SCRIPT = shipped.folder("export") / "predict.py"
predict = shipped.load(SCRIPT)
SIZES = [(1, 1), (17, 9), (32, 32), (33, 57), (57, 33), (64, 200), (301, 97), (35, 36), (224, 31)]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def photo(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Noise over a ramp: every value occurs, and no two filters agree on it."""
    random = np.random.default_rng(size)
    ramp = np.linspace(0, 200, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    image = Image.fromarray((ramp + random.integers(0, 56, ramp.shape)).astype(np.uint8))
    return image.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)


def assert_equal_to_timm(image: Image.Image, config: dict) -> None:
    converted = image.convert("L" if config["input_size"][0] == 1 else "RGB")
    expected = create_transform(**config, is_training=False)(converted)
    given = predict.preprocess(image, config)
    assert given.dtype == np.float32 and given.flags["C_CONTIGUOUS"]
    assert np.array_equal(given, expected.numpy())


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.95])
def test_equal_to_timm_bit_for_bit(crop_mode, interpolation, crop_pct):
    for input_size in ([3, 32, 32], [3, 48, 32], [3, 31, 47]):
        config = {"input_size": input_size, "interpolation": interpolation, "crop_pct": crop_pct, **IMAGENET}
        for size in SIZES:
            assert_equal_to_timm(photo(size), config | {"crop_mode": crop_mode})


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_one_channel(crop_mode):
    config = {"input_size": [1, 28, 28], "interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": crop_mode}
    for mode in ("L", "RGB", "1", "P"):
        assert_equal_to_timm(photo((41, 30), mode), config | {"mean": [0.1307], "std": [0.3081]})


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1", "YCbCr"])
def test_every_kind_of_image(mode):
    config = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center", **IMAGENET}
    assert_equal_to_timm(photo((50, 41), mode), config)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_not_clipped_to_white(channels):
    config = {"input_size": [channels, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    config |= {"mean": [0.5] * channels, "std": [0.2] * channels}
    grey = photo((50, 41), "L")
    values = np.asarray(grey).astype(np.uint16) * 257
    expected = predict.preprocess(grey, config)
    for deep in (Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
        assert deep.mode in ("I;16", "I") and np.array_equal(predict.preprocess(deep, config), expected)
    with pytest.raises(predict.PredictError, match="floating-point"):
        predict.preprocess(grey.convert("F"), config)


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 250, 10))])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_palette_is_read_as_in_training(channels, transparency, tmp_path):
    config = {"input_size": [channels, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
    config |= {"mean": [0.5] * channels, "std": [0.2] * channels}
    photo((50, 41), "P").save(tmp_path / "image.png", transparency=transparency)
    with Image.open(tmp_path / "image.png") as image:
        image.load()
    trained_on = convert(image, "L" if channels == 1 else "RGB")
    expected = create_transform(**config, is_training=False)(trained_on)
    assert np.array_equal(predict.preprocess(image, config), expected.numpy())  # without a warning of Pillow's


def test_defaults_are_those_of_timm():
    config = {"input_size": [3, 224, 224], **IMAGENET, "interpolation": "bilinear", "crop_pct": None, "crop_mode": None}
    assert_equal_to_timm(photo((200, 300)), config)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A bundle of a network that names the brightest channel, with images of each."""
    folder = tmp_path_factory.mktemp("bundle")
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        network[2].weight.copy_(torch.eye(3))
    config = {"input_size": [3, 16, 16], "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center", **IMAGENET}
    targets.find("onnx").module.write(network, torch.zeros(2, 3, 16, 16), folder / "model.onnx")
    (folder / "preprocess.json").write_text(json.dumps(config))
    (folder / "labels.txt").write_text("red\ngrün\nblue\n", encoding="utf-8")
    shutil.copy(SCRIPT, folder)
    (folder / "images" / "more").mkdir(parents=True)
    for name, colour in {"a.png": (200, 0, 0), "b.jpg": (0, 200, 0), "more/c.bmp": (0, 0, 200)}.items():
        Image.new("RGB", (20, 30), colour).save(folder / "images" / name)
    (folder / "images" / "notes.txt").write_text("not an image")
    return folder


def run(bundle: Path, *arguments: str, stdin: Path | None = None) -> subprocess.CompletedProcess[str]:
    """predict.py as a user types it, with torch, torchvision, timm and okdc made impossible to import."""
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'timm', 'okdc', 'onnx']))"
    code = f"{block}; import runpy; sys.argv[0] = 'predict.py'; runpy.run_path('predict.py', run_name='__main__')"
    command = [sys.executable, "-X", "utf8", "-c", code, *arguments]
    with open(stdin or os.devnull, "rb") as given:
        return subprocess.run(
            command, cwd=bundle, stdin=given, capture_output=True, text=True, encoding="utf-8", check=False
        )


def test_needs_numpy_pillow_and_onnxruntime_only():
    nodes = list(ast.walk(ast.parse(SCRIPT.read_text())))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"numpy", "PIL", "onnxruntime"}


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """The Python of an environment that has numpy, pillow and onnxruntime, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("[Ll]ib/**/site-packages")
    for module in (np, PIL, onnxruntime):
        place = Path(module.__file__).parent
        (packages / place.name).symlink_to(place)
        for libraries in place.parent.glob(f"{'pillow' if module is PIL else place.name}.libs"):
            (packages / libraries.name).symlink_to(libraries)
    return next(folder.glob("[bS]*/python*"))


def test_runs_where_nothing_else_is_installed(bundle, bare_python):
    code = (
        "import importlib.util, json, runpy, sys\n"
        "assert not any(map(importlib.util.find_spec, ['torch', 'timm', 'onnx', 'okdc']))\n"
        "try: runpy.run_path('predict.py', run_name='__main__')\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "found = {name.partition('.')[0] for name, module in sys.modules.items()"
        " if 'site-packages' in (getattr(module, '__file__', None) or '')}\n"
        "print(json.dumps(sorted(found)))"
    )
    done = subprocess.run(
        [bare_python, "-I", "-X", "utf8", "-W", "error", "-c", code, "images", "--top", "1"],
        cwd=bundle, capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    *lines, modules = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["red", "grün", "blue"]
    assert json.loads(modules) == ["PIL", "numpy", "onnxruntime"]


def test_folder_of_images(bundle):
    done = run(bundle, "images", "--top", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(Path(line["image"]).name, line["predictions"][0]["label"]) for line in lines] == [
        ("a.png", "red"), ("b.jpg", "grün"), ("c.bmp", "blue"),
    ]  # fmt: skip
    assert all(len(line["predictions"]) == 1 for line in lines)
    assert [line["predictions"][0]["index"] for line in lines] == [0, 1, 2]
    assert all(0.3 < line["predictions"][0]["probability"] < 1 for line in lines)


def test_text_output(bundle):
    done = run(bundle, "images/a.png", "images/b.jpg")
    first, second = done.stdout.splitlines()
    assert first.split()[:2] == ["images/a.png", "red"] and first.count("%") == 3  # no more labels than there are
    assert second.split()[1] == "grün" and done.returncode == 0


def test_unreadable_image_is_named_and_skipped(bundle, tmp_path):
    (tmp_path / "bad.png").write_bytes((bundle / "images" / "a.png").read_bytes()[:60])
    done = run(bundle, str(tmp_path / "bad.png"), "images/a.png")
    assert done.returncode == 1 and "bad.png cannot be read" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.startswith("images/a.png")


def test_heic_in_a_folder_is_named_with_what_reads_it(bundle, tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    done = run(bundle, str(tmp_path), "images/a.png")
    assert done.returncode == 1 and done.stdout.startswith("images/a.png")
    assert "IMG_1.HEIC cannot be read" in done.stderr and "pip install pillow-heif" in done.stderr


def test_each_image_has_its_line_of_json_also_one_that_cannot_be_read(bundle, tmp_path):
    (tmp_path / "cut.png").write_bytes((bundle / "images" / "a.png").read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("not an image")
    names = ["images/b.jpg", str(tmp_path / "cut.png"), "images/a.png", str(tmp_path / "text.jpg"), "images/more"]
    for size in ("1", "2", "32"):
        done = run(bundle, *names, "--json", "--batch-size", size)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert (done.returncode, done.stderr) == (1, "")
        assert [line["image"] for line in lines] == [*names[:4], "images/more/c.bmp"]
        found = [line["predictions"][0]["label"] if "predictions" in line else None for line in lines]
        assert found == ["grün", None, "red", None, "blue"]
        assert lines[3]["error"] == "cannot be read as an image: it is of no known format"


def test_an_image_comes_from_stdin(bundle):
    done = run(bundle, "-", "images/a.png", "--json", "--top=1", stdin=bundle / "images" / "b.jpg")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    found = [(line["image"], line["predictions"][0]["label"]) for line in lines]
    assert found == [("-", "grün"), ("images/a.png", "red")]
    done = run(bundle, "-")  # nothing comes
    assert done.returncode == 1 and done.stderr.startswith("- cannot be read as an image: it is of no known format")


def test_a_device_that_is_not_here_is_no_other_device(bundle):
    done = run(bundle, "images", "--device", "cuda:9")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "onnxruntime cannot use cuda:9" in done.stderr
    done = run(bundle, "images", "--device", "gpu")
    assert (done.returncode, done.stderr) == (2, "There is no device 'gpu': give cpu, cuda or cuda:1.\n")


def test_a_model_that_fails_on_an_image_has_an_exit_code_of_its_own(bundle, tmp_path):
    whole = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    config = json.loads((whole / "preprocess.json").read_text())
    (whole / "preprocess.json").write_text(json.dumps(config | {"input_size": [1, 16, 16], "mean": [0], "std": [1]}))
    done = run(whole, "images")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert done.stderr.startswith("model.onnx fails on 3 images at once: ")


def test_names_that_are_no_text_and_readers_that_have_enough(bundle, tmp_path):
    if sys.platform == "win32" or sys.platform == "darwin":
        pytest.skip("names of files are text on this system")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    shutil.copy(bundle / "images" / "a.png", odd)
    done = run(bundle, odd, "--json", "--top=1")
    assert done.returncode == 0 and json.loads(done.stdout)["image"] == odd
    assert "Traceback" not in (done := run(bundle, odd)).stderr and done.returncode == 0
    command = f"{sys.executable} predict.py images images images --batch-size 1 2>{tmp_path}/said | head -n 1"
    subprocess.run(command, shell=True, cwd=bundle, capture_output=True, check=True)
    assert (tmp_path / "said").read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["https://example.org/a.png"], "https://example.org/a.png is an address"),
        (["nowhere.png"], "no image or folder"), (["empty"], "holds no images"), (["a.png", "--top=0"], "--top"),
        (["a.png", "--batch-size=0"], "--batch-size must be at least 1, not 0"),
    ],
)  # fmt: skip
def test_wrong_use(bundle, arguments, message):
    (bundle / "empty").mkdir(exist_ok=True)
    done = run(bundle, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.onnx", None, "has no model.onnx"),
        ("model.onnx", "broken", "is broken"),
        ("preprocess.json", "{", "is broken"),
        ("labels.txt", "one\n", "labels.txt names 1 classes and model.onnx has 3"),
    ],
)
def test_incomplete_bundle(bundle, tmp_path, name, content, message):
    for file in ("model.onnx", "preprocess.json", "labels.txt"):
        shutil.copy(bundle / file, tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(predict.PredictError, match=message):
        predict.load(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nope.onnx", "--model nope.onnx: it is not in .*The ONNX files there: model.onnx"),
        ("labels.txt", "--model labels.txt: it is no ONNX file. The ONNX files there: model.onnx"),
    ],
)
def test_a_model_that_is_not_there_is_not_the_bundles_fault(bundle, model, message):
    with pytest.raises(predict.PredictError, match=message):
        predict.load(bundle, model=model)


def test_only_a_line_break_ends_a_label(bundle, tmp_path):
    for file in ("model.onnx", "preprocess.json"):
        shutil.copy(bundle / file, tmp_path)
    names = ["red\u2028or\x85rouge", "gr\x0cün", "blue\x1c"]
    (tmp_path / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8", newline="\n")
    assert predict.load(tmp_path).labels == names


def test_batches_give_what_single_images_give(bundle):
    predictor = predict.load(bundle, threads=1)
    images = [photo((20 + i, 30)) for i in range(predict._BATCH + 3)]
    together = predictor.logits(images)
    assert together.shape == (len(images), 3) and predictor.logits([]).shape == (0, 3)
    assert np.allclose(together, np.concatenate([predictor.logits([image]) for image in images]), atol=1e-6)
    (best, *others), *_ = predictor(images, top=3)
    assert best[1] >= others[0][1] and sum(odds for _, odds in [best, *others]) == pytest.approx(1)
