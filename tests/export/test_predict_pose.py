"""predict.py for key points: with numpy, pillow and onnxruntime alone it finds what the training side finds."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from okdc.system import shipped

PROGRAM = shipped.program(shipped.folder("export") / "predict_pose.py")
SPOTS = ((30.3, 21.6), (52.8, 40.2))  # of a red and a green light in the frame
SIZE = (64, 48)  # of the frame, width and height


def heat_maps() -> onnx.ModelProto:
    """A network whose maps are an image's red and green at half its size: a blurred light is a Gaussian there."""
    channels = onnx.numpy_helper.from_array(np.array([0, 1]), "channels")
    nodes = [
        onnx.helper.make_node("Gather", ["images", "channels"], ["colours"], axis=1),
        onnx.helper.make_node("AveragePool", ["colours"], ["maps"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    given, told = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("images", (3, 48, 64)), ("maps", (2, 24, 32)))
    )
    graph = onnx.helper.make_graph(nodes, "lights", [given], [told], [channels])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def lights() -> Image.Image:
    """Two Gaussian lights, so wide that what bilinear resizing does to them is little."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    planes = [255 * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * 4.0**2)) for a, b in SPOTS]
    return Image.fromarray(np.stack([*planes, np.zeros_like(planes[0])], -1).round().astype(np.uint8))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    onnx.save(heat_maps(), folder / "model.onnx")
    config = {"input_size": [3, 48, 64], "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear"}
    (folder / "preprocess.json").write_text(json.dumps(config))
    (folder / "labels.txt").write_text("red\ngreen\n")
    noted = {
        "names": ["red", "green"], "skeleton": [[0, 1]], "pairs": [], "sigmas": [0.05, 0.05], "stride": 2.0,
        "input": [64, 48], "sigma": 2.0, "decoding": "log-parabola", "boxes": "given", "margin": 1.25,
    }  # fmt: skip
    (folder / "keypoints.json").write_text(json.dumps(noted))
    (folder / "predict.py").write_text(PROGRAM, encoding="utf-8")
    lights().save(folder / "frame.png")
    return folder


def run(bundle: Path, *arguments: str, stdin: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "predict.py", *arguments]
    with (stdin or Path(os.devnull)).open("rb") as given:
        return subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=60, stdin=given)


def test_the_program_of_a_bundle_is_one_file_that_needs_little() -> None:
    tree = ast.parse(PROGRAM)
    imports = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imports |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    third = {name.split(".")[0] for name in imports if name} - set(sys.stdlib_module_names)
    assert third == {"numpy", "PIL", "onnxruntime"}
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names)) and {"Bundle", "_upright", "main"} <= set(names)
    assert not {"preprocess", "_ranked"} & set(names)
    other = shipped.folder("export") / "predict.py"
    assert shipped.program(other) == other.read_text(encoding="utf-8")


@pytest.mark.parametrize("box", [None, (20.5, 10.0, 40.0, 38.5), (25, 15, 32, 30)])
def test_points_are_found_between_pixels_through_crop_and_margin(bundle: Path, box: tuple[float, ...] | None) -> None:
    predictor = shipped.load(bundle / "predict.py").load(bundle)
    points = predictor([lights(), lights()], box)
    assert points.shape == (2, 2, 3) and points[..., 2].min() > 0.9
    assert np.abs(points[:, :, :2] - np.array(SPOTS)).max() < 0.1


@pytest.mark.parametrize("decoding", ["log-parabola", "official"])
def test_exact_gaussians_are_decoded_exactly(bundle: Path, decoding: str) -> None:
    decode, centre = shipped.load(bundle / "predict.py").decode, np.array([5.3, 7.8])
    x, y = np.meshgrid(np.arange(16), np.arange(12))
    maps = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 1.5**2))[None, None]
    found = decode(maps, (4.0, 3.0), decoding == "official")[0, 0, :2]
    exact = (centre + 0.5) * (4, 3) - 0.5
    assert found == pytest.approx(exact if decoding == "log-parabola" else (5.25 * 4, 7.75 * 3), abs=1e-9)
    assert decode(np.zeros((1, 1, 4, 4)), (4.0, 4.0), True)[0, 0].tolist() == [0, 0, 0]


def test_the_command_line_prints_and_draws(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    done = run(
        bundle, "frame.png", str(tmp_path / "broken.png"), "--json", "--box", "20,10,40,38", "--draw", str(tmp_path)
    )
    assert done.returncode == 1 and done.stderr == ""
    first, second = map(json.loads, done.stdout.splitlines())
    assert [(p["name"], round(p["x"]), round(p["y"])) for p in first["points"]] == [("red", 30, 22), ("green", 53, 40)]
    assert "cannot be read as an image" in second["error"]
    with Image.open(tmp_path / "frame.points.png") as drawn:
        assert drawn.size == SIZE and drawn.getpixel((53, 40)) == (0x2F, 0x7E, 0xD8)
        middle = drawn.crop((40, 29, 44, 33))  # half way between the two
        assert (255, 255, 255) in {colour for _, colour in middle.getcolors()}
    piped = run(bundle, "-", stdin=bundle / "frame.png")
    assert piped.returncode == 0 and piped.stdout.startswith("-  red 30.") and "--box says where" in piped.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frame.png", "--box", "1,2,3"], "1,2,3 is no box: give X,Y,WIDTH,HEIGHT"),
        (["frame.png", "frame.png", "--draw", "."], "several images would become frame.points.png"),
    ],
)
def test_wrong_use(bundle: Path, arguments: list[str], message: str) -> None:
    done = run(bundle, *arguments)
    assert done.returncode == 2 and message in done.stderr
