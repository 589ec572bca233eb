"""fp16 and int8 on the whole road: a student trained on real digits, its bundle, and faults planted in that bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from onnx import numpy_helper

import okdc
from okdc import deploy, pipeline
from okdc.cli import main, run_commands
from okdc.data import Data, wrap
from okdc.deploy import calibration, targets
from okdc.deploy.bundle import recommend, write_json, write_sums
from okdc.errors import ExportError, GateError
from okdc.pipeline import Result
from okdc.recipe import ExportSettings
from okdc.system import shipped
from okdc.training import checkpoint
from okdc.verification import schema, torch_runner
from tests.export import fake_tensorrt

QUICK = ExportSettings(batch_sizes=[])
ROWS = ["torch", "onnx", "onnx_fp16", "onnx_int8", "onnx_int8_trt", "predict.py"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A small network after a few epochs of digits, exported in every precision."""
    return okdc.compress(
        "test_resnet", method="baseline", output=tmp_path_factory.mktemp("runs"), experiment="digits", img_size=32,
        no_aug=True, epochs=4, batch_size=32, opt="adamw", lr=0.003, workers=0, fp16=True, int8=True,
        calibration_images=64, batch_sizes=[1], license="mit",
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(result: Result) -> Path:
    return result.path / "export"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may spoil."""
    return Path(shutil.copytree(bundle, tmp_path / "export"))


def rows(verification: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in verification["rows"]}


def test_every_precision_is_exported_verified_and_as_accurate(result: Result, bundle: Path) -> None:
    verification = result.verification
    assert verification is not None and verification["verdict"] == "pass"
    found = rows(verification)
    assert list(found) == ROWS and found["torch"]["top1"] > 90
    assert all(row["pass"] for row in found.values())
    assert [found[name]["precision"] for name in ROWS[1:5]] == ["fp32", "fp16", "int8", "int8"]
    assert all(found["torch"]["top1"] - found[name]["top1"] <= 1 for name in ROWS[2:5])
    assert {entry["batch"] for entry in found["onnx_int8"]["differences"]} >= {1, 3, 32}
    assert found["onnx_int8"]["mb"] < found["onnx_fp16"]["mb"] < found["onnx"]["mb"]
    assert found["onnx_int8_trt"]["latency"] == [] and found["onnx_int8_trt"]["worth_shipping"] is None
    assert verification["parameters"] == verification["exports"]["onnx"]["parameters"]
    card = (bundle / "README.md").read_text()
    assert (
        card.startswith("---\nlicense: mit\n")
        and "Recommended here" in card
        and "calibrated on 64 training images" in card
        and "`model.int8.onnx`" in card
    )
    assert deploy.check_sums(bundle) == []


def test_calibrated_on_training_images_as_they_are_for_evaluation(result: Result) -> None:
    data: Data = result.data
    drawn, facts = calibration.draw(data, 64)
    assert (result.verification or {})["calibration"] == facts
    assert facts["images"] == 64 and facts["also_validated"] == 0 and not facts["augmented"]
    validation = torch.cat([images for images, _ in data.validation or ()]).numpy()
    assert drawn.shape[1:] == validation.shape[1:]
    distances = np.abs(drawn[:, None, 0, ::4, ::4] - validation[None, :, 0, ::4, ::4]).max((2, 3))
    assert distances.min() > 1e-3
    assert abs(drawn.mean() - validation.mean()) < 0.1 and abs(drawn.std() - validation.std()) < 0.1  # not augmented
    same, _ = calibration.draw(data, 64)
    assert np.array_equal(same, drawn)


class Pictures:
    """Data whose first three training images are validation images, too."""

    def __init__(self, data: Data, shared: int) -> None:
        own = [data.training_images[i] for i in range(6)]  # type: ignore[index]
        self.training_images, self.validation_images = own, own[:shared]
        self.preprocess, self.name = data.preprocess, "pictures"


def test_images_that_are_validated_on_are_left_out(result: Result) -> None:
    images, facts = calibration.draw(Pictures(result.data, 3), 10)
    assert len(images) == facts["images"] == 3 and facts["also_validated"] == 3
    with pytest.raises(ExportError, match="pictures has 1 that are not"):
        calibration.draw(Pictures(result.data, 5), 10)


def test_without_data_int8_is_skipped_with_the_flag_to_type(tmp_path: Path, result: Result) -> None:
    settings = ExportSettings(int8=True, fp16=True, batch_sizes=[])
    known = {"preprocess": result.data.preprocess, "classes": result.data.classes}
    verification = deploy.export_bundle(result.student, None, settings, tmp_path / "x", arch="test_resnet", **known)
    skipped = {entry["target"]: entry["reason"] for entry in verification["skipped"]}
    assert "--data" in skipped["onnx_int8"] and "--data" in skipped["onnx_int8_trt"]
    assert verification["verdict"] == "parity_only" and rows(verification)["onnx_fp16"]["pass"]


def test_without_images_to_calibrate_on_all_but_int8_is_written(result: Result, tmp_path: Path) -> None:
    images, labels = next(iter(result.data.validation or ()))
    known = {"num_classes": 10, "preprocess": result.data.preprocess, "name": "one"}
    data = replace(wrap([(images, labels)], [(images, labels)], **known), training_images=[])
    settings = ExportSettings(int8=True, batch_sizes=[])
    verification = deploy.export_bundle(result.student, data, settings, tmp_path / "x", arch="test_resnet")
    assert verification["verdict"] == "pass" and list(rows(verification)) == ["torch", "onnx"]
    skipped = {entry["target"]: entry["reason"] for entry in verification["skipped"]}
    for target in ("onnx_int8", "onnx_int8_trt"):
        assert skipped[target].startswith("int8 is calibrated on at least two training images, and one has 0")
    with pytest.raises(ExportError, match="no int8 file was written: int8 is calibrated on") as caught:
        run_commands.require_asked(verification, {"int8": True, "trt": False})
    assert caught.value.exit_code == 2


class Bright(torch.nn.Module):
    """Overflows in float16 on images from 0 to 255, not on noise."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head((images * 1000).relu().mean((2, 3)) / 1000)


def test_overflow_of_fp16_is_looked_for_on_training_images(tmp_path: Path) -> None:
    images, labels = 255 * torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    config = {"input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    data = wrap([(images, labels)], [(images, labels)], num_classes=4, preprocess=config, name="bright")
    settings = ExportSettings(fp16=True, batch_sizes=[], max_drop=100, min_agreement=0)
    verification = deploy.export_bundle(Bright(), data, settings, tmp_path / "x", arch="Bright")
    assert verification["exports"]["onnx_fp16"]["kept_in_float"] and verification["calibration"] is None


ENGINES = {"tensorrt": {"fp32"}, "tensorrt_fp16": {"fp16", "fp32"}, "tensorrt_int8": {"fp32", "int8"}}


def test_every_engine_on_the_whole_road_with_a_fake_tensorrt(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = fake_tensorrt.pretend(monkeypatch, list(fake_tensorrt.NAMES)[-1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = Path(shutil.copytree(result.path, tmp_path / "run", ignore=shutil.ignore_patterns("export")))
    wanted = {"trt": True, "fp16": True, "int8": True, "triton": True, "workspace": 2.5, "batch_sizes": []}
    verification = pipeline.export(run, calibration_images=16, **wanted)
    found, bundle = rows(verification), run / "export"
    assert verification["verdict"] == "pass" and list(found) == [*ROWS[:-1], *ENGINES, "predict.py"]
    for name, precisions in ENGINES.items():
        assert found[name]["layers"].keys() == precisions and found[name]["provider"].endswith(" on H100")
        assert found[name]["pass"] and found[name]["agreement"] >= 97
    assert package.plan.told.count(("WORKSPACE", int(2.5 * 2**30))) == len(ENGINES)
    assert [path.suffix for path in (tmp_path / "cache" / "okdc").iterdir()] == [".timing"]
    plans = [path.read_bytes() for path in (bundle / "triton").rglob("model.plan")]
    assert plans == [(bundle / "model.engine").read_bytes()]
    assert deploy.check_sums(bundle) == []
    card = (bundle / "README.md").read_text()
    assert all(f"- `{path.name}`: " in card for path in bundle.iterdir() if path.name != "README.md")
    for end in ("", ".json"):  # the float32 engine sold as float16
        shutil.copyfile(bundle / f"model.engine{end}", bundle / f"model.fp16.engine{end}")
    write_sums(bundle)
    again = deploy.verify_bundle(bundle, result.data, QUICK)
    (failed,) = [row for row in again["rows"] if not row["pass"]]
    assert again["verdict"] == "fail" and failed["name"] == "tensorrt_fp16"
    assert "no layer in the precision of its name, only fp32" in failed["reason"]


def conforms(value: Any, kind: Any, where: str = "verification") -> list[str]:
    """Where a json value is not of a type: missing, unknown or wrongly typed fields."""
    origin, arguments = get_origin(kind), get_args(kind)
    if (is_typeddict(kind) and type(value) is not dict) or (origin in (list, dict) and type(value) is not origin):
        return [f"{where} is {value!r}"]
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        missing = [f"{where}.{key} is missing" for key in kind.__required_keys__ - value.keys()]
        unknown = [f"{where}.{key} is unknown" for key in value.keys() - hints.keys()]
        known = [conforms(value[key], hint, f"{where}.{key}") for key, hint in hints.items() if key in value]
        return missing + unknown + [each for found in known for each in found]
    if origin is list:
        return [each for i, entry in enumerate(value) for each in conforms(entry, arguments[0], f"{where}[{i}]")]
    if origin is dict:
        return [each for key, entry in value.items() for each in conforms(entry, arguments[1], f"{where}.{key}")]
    if arguments:
        return min((conforms(value, each, where) for each in arguments), key=len)
    if kind is Any or (kind is float and type(value) is int) or type(value) is kind:
        return []
    return [f"{where} is {value!r}, not {kind.__name__}"]


def test_verification_json_is_as_its_schema_says(bundle: Path, result: Result, tmp_path: Path) -> None:
    written = json.loads((bundle / "verification.json").read_text())
    assert written["schema_version"] == schema.VERSION == 4
    assert conforms(written, schema.Verification) == []
    assert written == result.verification, "what is returned is what is written"
    write_json(tmp_path / "again.json", written)
    assert (tmp_path / "again.json").read_bytes() == (bundle / "verification.json").read_bytes()
    again = deploy.verify_bundle(bundle, result.data, ExportSettings(batch_sizes=[2]))
    assert again["verdict"] == "pass" and conforms(again, schema.Verification) == []
    assert conforms(written | {"images": "many", "extra": 1}, schema.Verification)
    del written["rows"][0]["ties"]
    assert conforms(written, schema.Verification) == ["verification.rows[0].ties is missing"]


def test_predict_runs_the_recommended_file(copy: Path, result: Result) -> None:
    config = json.loads((copy / "config.json").read_text())
    recommended = (result.verification or {})["recommended"]
    assert config["okdc"]["model"] == recommended["file"]
    predict = shipped.load(shipped.folder("export") / "predict.py")
    originals = [image for image, _ in result.data.validation_images or ()]
    expected = np.concatenate([torch_runner(result.student)(x.numpy()) for x, _ in result.data.validation or ()])
    exact = predict.load(copy, model="model.onnx").logits(originals)
    assert np.array_equal(exact.argmax(1), expected.argmax(1))
    for file in ("model.int8.onnx", "model.fp16.onnx"):
        recommend(copy, file)
        predictor = predict.load(copy)
        given = predictor.logits(originals)
        assert predictor.file == file and (given.argmax(1) == expected.argmax(1)).mean() >= 0.97
        assert not np.array_equal(given, exact)
    originals[0].save(copy.parent / "digit.png")
    command = [sys.executable, str(copy / "predict.py"), str(copy.parent / "digit.png"), "--json", "--model"]
    for file, code in (("model.int8.onnx", 0), ("model.int4.onnx", 2)):
        done = subprocess.run([*command, file], capture_output=True, text=True, check=False)
        assert done.returncode == code and ("model.int4.onnx: it is not in" in done.stderr) is (code == 2)


def test_a_file_with_the_preprocessing_inside_is_held_to_raw_images(result: Result, tmp_path: Path) -> None:
    bundle, settings = tmp_path / "x", ExportSettings(embed_preprocess=True, batch_sizes=[])
    verification = deploy.export_bundle(result.student, result.data, settings, bundle, arch="test_resnet")
    row = rows(verification)["onnx_full"]
    assert row["pass"] and row["agreement"] == 100 and 0 < row["rel"] < 1e-2 and row["file"] == "model.full.onnx"
    assert row["top1"] == pytest.approx(rows(verification)["torch"]["top1"], abs=0.5) and row["mb"] > 0
    assert "- `model.full.onnx`: decoded images in" in (bundle / "README.md").read_text()
    unseen = deploy.verify_bundle(bundle, replace(result.data, validation_images=None), QUICK)
    assert {"model.full.onnx", "predict.py"} <= {each["target"] for each in unseen["skipped"]}
    network = onnx.load(bundle / "model.full.onnx")
    for tensor in network.graph.initializer:
        if tensor.name.startswith("preprocess/") and numpy_helper.to_array(tensor).shape[1:] == (3, 1, 1):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.2), tensor.name))
    onnx.save(network, bundle / "model.full.onnx")
    write_sums(bundle)
    again = deploy.verify_bundle(bundle, result.data, QUICK)
    assert again["verdict"] == "fail" and [row["name"] for row in again["rows"] if not row["pass"]] == ["onnx_full"]


def test_a_variant_alone_is_a_bundle(result: Result, tmp_path: Path) -> None:
    settings = ExportSettings(onnx=False, int8=True, calibration_images=64, batch_sizes=[])
    verification = deploy.export_bundle(result.student, result.data, settings, tmp_path / "x", arch="test_resnet")
    assert list(rows(verification)) == ["torch", "onnx_int8", "onnx_int8_trt", "predict.py"]
    assert verification["recommended"]["file"] == "model.int8.onnx" and not (tmp_path / "x" / "model.onnx").exists()


def test_a_variant_that_fails_is_left_out_unless_it_is_all_there_is(result: Result, tmp_path: Path) -> None:
    torch.manual_seed(0)
    untrained = timm.create_model("test_resnet", num_classes=10).eval()
    images = next(iter(result.data.validation or ()))[0]
    with torch.no_grad():  # what all images have in common is taken away, so that its choices hang on the last digits
        untrained.get_classifier().bias -= untrained(images).mean(0)
    kwargs = {"arch": "test_resnet"}
    settings = ExportSettings(int8=True, calibration_images=16, batch_sizes=[], min_agreement=99.9)
    verification = deploy.export_bundle(untrained, result.data, settings, tmp_path / "a", **kwargs)
    found = rows(verification)["onnx_int8"]
    assert verification["verdict"] == "pass" and verification["recommended"]["file"] == "model.onnx"
    assert not found["pass"] and found["worth_shipping"] is False and "agrees with torch" in found["reason"]
    assert (tmp_path / "a" / "model.onnx").exists() and not (tmp_path / "a" / "model.int8.onnx").exists()
    assert "it is not in this folder" in (tmp_path / "a" / "README.md").read_text()
    assert deploy.verify_bundle(tmp_path / "a", result.data, QUICK)["verdict"] == "pass"
    alone = ExportSettings(onnx=False, int8=True, calibration_images=16, batch_sizes=[], min_agreement=99.9)
    with pytest.raises(GateError, match="onnx_int8: it agrees"):
        deploy.export_bundle(untrained, result.data, alone, tmp_path / "b", **kwargs)
    assert not (tmp_path / "b").exists() and (tmp_path / "b-failed" / "model.int8.onnx").exists()


def test_without_a_gain_int8_stays_as_it_was_before_finetuning(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets.find("onnx_int8_finetuned").module, "_STEPS", 0)
    words = "--no-fp16 --no-int8 --int8-finetune --calibration-images 64 --batch-sizes ,"
    done = CliRunner().invoke(main, ["export", str(result.path), "--output", str(tmp_path / "x"), *words.split()])
    assert done.exit_code == 0, done.output
    found = rows(json.loads((tmp_path / "x" / "verification.json").read_text()))
    assert list(found) == ["torch", "onnx", "onnx_int8", "onnx_int8_finetuned", "predict.py"]
    assert found["onnx_int8"]["pass"] and (tmp_path / "x" / "model.int8.onnx").exists()
    assert "finetuning did not help" in found["onnx_int8_finetuned"]["reason"]
    assert not (tmp_path / "x" / "model.int8.finetuned.onnx").exists()
    assert "finetuning did not help" in " ".join((tmp_path / "x" / "README.md").read_text().split())


def test_int8_finetuned_is_judged_by_its_gate(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = []

    def write(
        student: Any, example: Any, path: Path, *, onnx: Path, onnx_int8: Path, finetuning: np.ndarray
    ) -> dict[str, Any]:
        shutil.copyfile(onnx, path)
        images.append(len(finetuning))
        return {}

    monkeypatch.setattr(targets.find("onnx_int8_finetuned").module, "write", write)
    settings = ExportSettings(int8_finetune=True, calibration_images=16, batch_sizes=[])
    verification = deploy.export_bundle(result.student, result.data, settings, tmp_path / "x", arch="test_resnet")
    assert "sold as int8" in rows(verification)["onnx_int8_finetuned"]["reason"]
    assert not (tmp_path / "x" / "model.int8.finetuned.onnx").exists()
    assert verification["verdict"] == "pass" and (tmp_path / "x" / "model.int8.onnx").exists()
    assert images == [1024] and (verification["calibration"] or {})["images"] == 16


def test_labels_of_the_data_shifted_by_one_fail_the_student_itself(bundle: Path, result: Result) -> None:
    batches = [(images, (labels + 1) % 10) for images, labels in result.data.validation or ()]
    shifted = replace(result.data, validation=batches, validation_images=None)
    verification = deploy.verify_bundle(bundle, shifted, QUICK)
    assert verification["verdict"] == "fail" and "when last measured" in rows(verification)["torch"]["reason"]


# ---- planted faults, in the run that is exported again


def wrong_colours(run: Path) -> None:
    student = json.loads((run / "student.json").read_text())
    student["preprocess"] |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    (run / "student.json").write_text(json.dumps(student))


def wrong_classes(run: Path) -> None:
    student = json.loads((run / "student.json").read_text())
    student["classes"] = student["classes"][1:] + student["classes"][:1]
    (run / "student.json").write_text(json.dumps(student))


def wrong_weights(run: Path) -> None:
    best, noise = checkpoint.load(run / checkpoint.BEST), torch.Generator().manual_seed(0)
    for weights in best["state_dict"].values():
        if weights.dtype == torch.float32 and weights.ndim > 1:
            weights += 0.5 * weights.std() * torch.randn(weights.shape, generator=noise)
    torch.save(best, run / checkpoint.BEST)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (None, None),
        (wrong_colours, "torch: its top-1 is .* when last measured"),
        (wrong_classes, "labels.txt: its class 0 is '1', the data's is '0'"),
        (wrong_weights, "torch: its top-1 is .* when last measured"),
    ],
)
def test_a_run_that_is_exported_again_is_held_to_its_report_and_its_data(
    result: Result, tmp_path: Path, spoil: Callable[[Path], None] | None, reason: str | None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(result.path, run, ignore=shutil.ignore_patterns("export"))
    settings = {"onnx": False, "fp16": False, "int8": False, "batch_sizes": []}
    if spoil is None or reason is None:
        assert pipeline.export(run, **settings)["verdict"] == "pass"
        return
    spoil(run)
    with pytest.raises(deploy.UnfitError, match=reason):
        pipeline.export(run, **settings)
    assert not (run / "export").exists()


# ---- planted faults, in the bundle


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def swap_channels(folder: Path) -> None:
    """BGR: the first convolution sees the channels in the other order."""
    model = onnx.load(folder / "model.onnx")
    name = next(node.input[1] for node in model.graph.node if node.op_type == "Conv")
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(tensor)[:, ::-1]), name))
    onnx.save(model, folder / "model.onnx")


def perturb(file: str, dtype: type) -> Callable[[Path], None]:
    """Noise in the weights of a file."""

    def spoil(folder: Path) -> None:
        model, random = onnx.load(folder / file), np.random.default_rng(0)
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == dtype and values.ndim > 1:
                values = values.astype(np.float32)
                noise = values.std() * random.standard_normal(values.shape)
                changed = (values + noise).clip(-127, 127).astype(dtype)
                tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        onnx.save(model, folder / file)

    return spoil


def sell(file: str, name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shutil.copyfile(folder / file, folder / name)

    return spoil


def shift_labels(folder: Path) -> None:
    labels = (folder / "labels.txt").read_text().splitlines()
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in [*labels[1:], labels[0]]))


@pytest.mark.parametrize(
    ("spoil", "row", "reason"),
    [
        (edit("preprocess.json", mean=[0.1, 0.1, 0.1]), "predict.py", "torch"),
        (edit("preprocess.json", std=[1.0, 1.0, 1.0]), "preprocess.json", "its std is [1.0, 1.0, 1.0], that in config"),
        (swap_channels, "onnx", "logits differ"),
        (perturb("model.onnx", np.float32), "onnx", "agrees with torch"),
        (perturb("model.fp16.onnx", np.float16), "onnx_fp16", "agrees with torch"),
        (perturb("model.int8.onnx", np.int8), "onnx_int8", "agrees with torch"),
        (sell("model.onnx", "model.int8.onnx"), "onnx_int8", "sold as int8, and its layers are"),
        (sell("model.onnx", "model.int8.trt.onnx"), "onnx_int8_trt", "sold as int8, and its layers are"),
        (sell("model.onnx", "model.fp16.onnx"), "onnx_fp16", "sold as fp16, and its layers are"),
        (sell("model.int8.onnx", "model.onnx"), "onnx", "sold as fp32, and its layers are"),
        (shift_labels, "labels.txt", "not those in config.json"),
    ],
    ids=[
        "wrong mean", "wrong std", "swapped channels", "perturbed fp32", "perturbed fp16", "perturbed int8",
        "fp32 sold as int8", "fp32 sold as int8 for TensorRT", "fp32 sold as fp16", "int8 sold as fp32",
        "labels shifted by one",
    ],
)  # fmt: skip
def test_planted_faults_fail_their_row_and_only_theirs(
    copy: Path, result: Result, spoil: Callable[[Path], None], row: str, reason: str
) -> None:
    spoil(copy)
    write_sums(copy)
    verification = deploy.verify_bundle(copy, result.data, QUICK)
    failed = {name: each["reason"] for name, each in rows(verification).items() if not each["pass"]}
    assert verification["verdict"] == "fail" and reason in failed.pop(row)
    also = {"onnx": {"predict.py"}, "predict.py": {"preprocess.json"}, "preprocess.json": {"predict.py"}}
    assert set(failed) <= also.get(row, set())  # predict.py runs model.onnx as preprocess.json says


@pytest.mark.parametrize("agreeing", [False, True])
@pytest.mark.parametrize("settings", [{}, {"images": 300}, None], ids=["all images", "some images", "no images"])
def test_a_fault_in_the_bundles_own_preprocessing_is_caught(
    result: Result, tmp_path: Path, settings: dict[str, Any] | None, agreeing: bool
) -> None:
    """The images are prepared as the bundle says: what is wrong there shows in what is known of it."""
    run = tmp_path / "run"
    shutil.copytree(result.path, run, ignore=shutil.ignore_patterns("*.tar", "*int8*", "*fp16*", "predict.py"))
    wrong = {"mean": [0.0] * 3, "std": [1.0] * 3}
    edit("preprocess.json", **wrong)(run / "export")
    if agreeing:  # the one who made the mistake made it everywhere
        edit("config.json", pretrained_cfg=wrong)(run / "export")
        (run / "export" / "model.onnx").unlink()
    write_sums(run / "export")
    if settings is None:
        (run / "recipe.yaml").unlink()  # a bundle that was copied alone
    verification = pipeline.verify(run, batch_sizes=[], **settings or {})
    failed = {name: each["reason"] for name, each in rows(verification).items() if not each["pass"]}
    assert ("preprocess.json" in failed) is not agreeing
    assert ("torch" in failed) is (settings is not None) and "when last measured" in failed.get(
        "torch", "when last measured"
    )
    assert verification["verdict"] == ("fail" if failed else "parity_only")


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_in_class_order_is_calibrated_on_all_its_classes(shuffle: bool) -> None:
    labels = torch.arange(4).repeat_interleave(16)
    images = labels.view(-1, 1, 1, 1).float() + torch.zeros(64, 3, 4, 4)
    dataset = torch.utils.data.TensorDataset(images, labels)
    drawn, facts = calibration.draw(wrap(torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=shuffle)), 16)
    assert facts["augmented"] and drawn.shape == (16, 3, 4, 4)
    classes = drawn[:, 0, 0, 0].tolist()
    assert set(classes) == {0, 1, 2, 3} and classes != sorted(classes), "nor are the first those of the first class"
