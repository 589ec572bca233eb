"""Every kind of fault that an export can have is caught by a gate, and a faithful export passes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from PIL import Image

from okdc import verification
from okdc.deploy import targets
from okdc.errors import DataError
from okdc.system import shipped
from okdc.system.wording import without_paths
from okdc.tasks.shared.class_scores import ClassTally as Tally
from okdc.verification import Exported, comparison
from okdc.verification.alone import measure_alone
from okdc.verification.comparison import Gates
from okdc.verification.latency import measure

SIZE = (3, 32, 32)
MEAN, STD = np.float32([0.5, 0.4, 0.3]), np.float32([0.2, 0.3, 0.25])


@dataclass(frozen=True)
class Images:
    """Validation data as okdc.data makes it: batches, and the same images raw."""

    validation: list[tuple[torch.Tensor, torch.Tensor]] | None
    validation_images: list[tuple[Image.Image, int]] | None


def preprocess(image: Image.Image) -> np.ndarray:
    return ((np.asarray(image, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


def colours(count: int = 40) -> list[tuple[Image.Image, int]]:
    """Noisy red, green, blue and grey images: a class each, so that wrong channels are wrong classes."""
    random = np.random.default_rng(0)
    shades = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [110, 110, 110]])
    noise = random.integers(-50, 50, (count, 32, 32, 3))
    return [(Image.fromarray((shades[i % 4] + noise[i]).clip(0, 255).astype(np.uint8)), i % 4) for i in range(count)]


@pytest.fixture(scope="module")
def data() -> Images:
    raw = colours()
    images, labels = np.stack([preprocess(image) for image, _ in raw]), torch.tensor([label for _, label in raw])
    return Images(list(zip(torch.from_numpy(images).split(16), labels.split(16), strict=True)), raw)


@pytest.fixture(scope="module")
def student(data: Images) -> torch.nn.Module:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=4)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(4):
        for images, labels in data.validation or ():
            torch.nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():  # settle the running statistics of the batch norms
        for _ in range(20):
            network(torch.cat([images for images, _ in data.validation or ()]))
    return network


@pytest.fixture(scope="module")
def exported(student: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    module, path = targets.find("onnx").module, tmp_path_factory.mktemp("onnx") / "model.onnx"
    module.write(student, torch.zeros(2, *SIZE), path)
    return Exported(path, module)


def target(folder: Path, body: str) -> Any:
    """An export target whose runner is the real one with a fault: `run` is right, `body` says what is returned."""
    file = folder / f"to_faulty{abs(hash(body))}.py"  # a shipped file is loaded once, so each has its own name
    source = targets.find("onnx").path
    file.write_text(
        f"import importlib.util, sys, os\nimport numpy as np\n"
        f"spec = importlib.util.spec_from_file_location('real', {str(source)!r})\n"
        f"real = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(real)\n"
        f"def runner(path, device='cpu', threads=None):\n    run = real.runner(path, device, threads)\n"
        f"    def faulty(x):\n        {body}\n    faulty.provider = run.provider\n    return faulty\n"
    )
    return shipped.load(file)


def compare(student: Any, exported: Exported, data: Any, **settings: Any) -> dict[str, dict[str, Any]]:
    """The rows of a comparison by name, and the verdict."""
    result = verification.compare(student, {"onnx": exported}, data, input_size=SIZE, batch_sizes=(), **settings)
    return {row["name"]: row for row in result["rows"]} | {"verdict": result["verdict"]}


def test_a_faithful_export_passes(student: torch.nn.Module, exported: Exported, data: Images) -> None:
    student.train()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    result = verification.compare(student, {"onnx": exported}, data, input_size=SIZE, batch_sizes=(1, 8))
    assert student.training and all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert result["verdict"] == "pass" and result["images"] == 40
    reference, row = result["rows"]
    images, labels = (torch.cat(parts) for parts in zip(*data.validation or (), strict=True))
    with torch.no_grad():
        logits = student.eval()(images)
    assert reference["top1"] == row["top1"] == 100 * (logits.argmax(1) == labels).double().mean()
    assert row["top1"] > 90 and row["top5"] == 100 and row["agreement"] == 100 and row["rel"] < 1e-5
    assert row["provider"] == "CPUExecutionProvider" and row["file"] == "model.onnx"
    for each in (reference, row):
        assert [latency["batch"] for latency in each["latency"]] == [1, 8]
        for latency in each["latency"]:
            assert 0 < latency["p50_ms"] <= latency["p90_ms"] <= latency["p99_ms"] and latency["samples"] >= 30
            assert latency["images_per_second"] > 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return np.roll(run(x), 1, axis=1)", "agrees with torch"),
        ("return run(x[:, ::-1].copy())", "agrees with torch"),
        ("return run(x) * np.float32(1.001)", "logits differ"),
        ("return run(x) * np.float32('nan')", "not finite"),
        ("return run(x)[:, :3]", "shape (16, 3)"),
        ("return run(x) if len(x) > 1 else run(x)[None]", "1 images at once"),
        ("if len(x) == 3: raise RuntimeError('fixed batch')\n        return run(x)", "3 images at once: fixed batch"),
        ("if len(x) == 32: raise RuntimeError('too many')\n        return run(x)", "32 images at once: too many"),
        ("raise RuntimeError('broken /home/me/model.onnx')", "does not run: broken model.onnx"),
    ],
)
def test_faulty_runners_fail(
    student: torch.nn.Module, exported: Exported, data: Images, tmp_path: Path, body: str, reason: str
) -> None:
    rows = compare(student, Exported(exported.path, target(tmp_path, body)), data)
    assert rows["verdict"] == "fail" and rows["torch"]["pass"]
    assert reason in rows["onnx"]["reason"]


@pytest.mark.parametrize("noise", [0.001, 0.5])
def test_perturbed_weights_fail(
    student: torch.nn.Module, exported: Exported, data: Images, tmp_path: Path, noise: float
) -> None:
    model, random = onnx.load(exported.path), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1:
            changed = values + noise * values.std() * random.standard_normal(values.shape)
            tensor.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    perturbed = Exported(tmp_path / "model.onnx", exported.module)
    assert not compare(student, perturbed, data)["onnx"]["pass"]
    rows = compare(student, perturbed, None)
    assert rows["verdict"] == "fail" and not rows["onnx"]["pass"]


def test_a_file_that_cannot_be_loaded_or_was_not_written_fails(
    student: torch.nn.Module, exported: Exported, data: Images, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    rows = compare(student, Exported(tmp_path / "model.onnx", exported.module), data)
    assert "cannot be loaded" in rows["onnx"]["reason"] and str(tmp_path) not in rows["onnx"]["reason"]
    rows = compare(student, Exported(tmp_path / "none.onnx", exported.module, "it could not be written"), data)
    assert rows["onnx"]["reason"] == "it could not be written" and rows["verdict"] == "fail"


def test_without_validation_images_only_parity_is_claimed(student: torch.nn.Module, exported: Exported) -> None:
    rows = compare(student, exported, None)
    assert rows["verdict"] == "parity_only"
    assert rows["onnx"]["top1"] is None and rows["onnx"]["agreement"] == 100 and rows["onnx"]["rel"] < 1e-5


def test_images_can_be_limited(student: torch.nn.Module, exported: Exported, data: Images) -> None:
    result = verification.compare(student, {"onnx": exported}, data, input_size=SIZE, batch_sizes=(), images=20)
    assert result["images"] == 20


@pytest.mark.parametrize(
    ("pipeline", "passes"),
    [
        (preprocess, True),
        (lambda image: preprocess(image)[::-1], False),
        (lambda image: preprocess(image) * STD[:, None, None], False),
        (lambda image: preprocess(image) + 0.3, False),
    ],
    ids=["right", "swapped channels", "wrong std", "wrong mean"],
)
def test_the_whole_pipeline_is_judged_on_raw_images(
    student: torch.nn.Module, exported: Exported, data: Images, pipeline: Callable[[Any], np.ndarray], passes: bool
) -> None:
    run = exported.module.runner(exported.path)
    pipelines = {"predict.py": lambda images: run(np.ascontiguousarray(np.stack([pipeline(i) for i in images])))}
    row = compare(student, exported, data, pipelines=pipelines)["predict.py"]
    assert row["pass"] is passes, row
    if passes:
        assert row["agreement"] == 100 and row["top1"] > 90


def test_pipelines_are_run_on_a_sample_and_held_against_torch_on_the_same(
    student: torch.nn.Module, exported: Exported, data: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "PIPELINE_IMAGES", 12)
    run, seen = exported.module.runner(exported.path), []

    def pipeline(images: Any) -> np.ndarray:
        seen.extend(images)
        return run(np.ascontiguousarray(np.stack([preprocess(each) for each in images])))

    found = verification.compare(
        student, {"onnx": exported}, data, input_size=SIZE, batch_sizes=(), pipelines={"predict.py": pipeline}
    )
    *_, row = found["rows"]
    assert found["images"] == 40 and len(seen) == 12 and row["pass"], row
    assert row["reason"] == "run on 12 of the 40 images, spread over the classes" and row["agreement"] == 100
    wrong = verification.compare(
        student, {"onnx": exported}, data, input_size=SIZE, batch_sizes=(), images=20,
        pipelines={"predict.py": lambda images: pipeline(images)[:, ::-1]},
    )  # fmt: skip
    assert len(seen) == 24 and not wrong["rows"][-1]["pass"] and wrong["images"] == 20


class Tie(torch.nn.Module):
    def __init__(self, margin: float) -> None:
        super().__init__()
        self.logits = np.float32([1.0, 1.0 + margin, 0, 0])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.logits).repeat(len(images), 1)

    def turned(self, images: Any) -> np.ndarray:
        return np.tile(self.logits[[1, 0, 2, 3]], (len(images), 1))


def test_a_tie_that_is_turned_over_passes_for_a_file_and_not_for_the_pipeline(exported: Exported, data: Images) -> None:
    tie = Tie(5e-5)
    file = Exported(exported.path, SimpleNamespace(runner=lambda path, device: tie.turned))  # type: ignore[arg-type]
    rows = compare(tie, file, data, pipelines={"predict.py": tie.turned})
    assert rows["onnx"]["pass"] and rows["onnx"]["ties"] == 40
    assert "agrees with torch on 0.00%" in rows["predict.py"]["reason"]
    lenient = Gates(max_drop=0.5, min_agreement=0.0)
    assert compare(tie, file, data, pipelines={"predict.py": tie.turned}, gates=lenient)["predict.py"]["pass"]


def test_a_tie_that_rounding_turns_over_costs_no_release(exported: Exported, data: Images) -> None:
    tie, second = Tie(1e-6), (data.validation_images or [])[1::4]
    images = torch.from_numpy(np.stack([preprocess(image) for image, _ in second]))
    one_class = Images([(images, torch.ones(len(images), dtype=torch.int64))], second)
    rows = compare(tie, exported, one_class, pipelines={"predict.py": tie.turned})
    assert (rows["torch"]["top1"], rows["predict.py"]["top1"], rows["predict.py"]["ties"]) == (100, 0, 10)
    assert rows["predict.py"]["pass"], rows["predict.py"]["reason"]


def test_raw_images_in_another_order_are_an_error(student: torch.nn.Module, exported: Exported, data: Images) -> None:
    shifted = Images(data.validation, (data.validation_images or [])[1:])
    with pytest.raises(DataError, match="same order"):
        compare(student, exported, shifted, pipelines={"predict.py": lambda images: np.zeros((len(images), 4))})


def test_labels_shifted_by_one_fail_the_reference_itself(
    student: torch.nn.Module, exported: Exported, data: Images
) -> None:
    shifted = Images([(images, (labels + 1) % 4) for images, labels in data.validation or ()], None)
    rows = compare(student, exported, shifted, gates=Gates(expected=100.0))
    assert "when last measured it was 100.00%" in rows["torch"]["reason"]
    assert rows["onnx"]["pass"]  # it is as good as the reference; the reference is what is wrong


def test_without_the_network_the_known_outputs_and_the_known_accuracy_judge(
    student: torch.nn.Module, exported: Exported, data: Images, tmp_path: Path
) -> None:
    inputs = np.random.default_rng(1).standard_normal((2, *SIZE), dtype=np.float32)
    golden = inputs, verification.torch_runner(student)(inputs)
    good = compare(None, exported, data, golden=golden, gates=Gates(expected=100.0, max_drop=5.0))
    assert good["verdict"] == "pass" and good["onnx"]["agreement"] is None and good["onnx"]["rel"] < 1e-5
    scaled = Exported(exported.path, target(tmp_path, "return run(x) * np.float32(1.01)"))
    assert "logits differ" in compare(None, scaled, data, golden=golden)["onnx"]["reason"]
    rolled = Exported(exported.path, target(tmp_path, "return run(x)[:, ::-1]"))
    assert not compare(None, rolled, data, gates=Gates(expected=100.0))["onnx"]["pass"]


def test_a_file_for_a_device_that_is_not_here_is_skipped_with_the_reason(
    student: torch.nn.Module, exported: Exported, data: Images
) -> None:
    targets = {"onnx": exported, "onnx elsewhere": replace(exported, device="elsewhere")}
    result = verification.compare(student, targets, data, input_size=SIZE, batch_sizes=())
    assert [row["name"] for row in result["rows"]] == ["torch", "onnx"] and result["verdict"] == "pass"
    (skipped,) = result["skipped"]
    assert skipped["target"] == "onnx elsewhere" and "cannot run on 'elsewhere'" in skipped["reason"]


def test_a_file_may_have_a_tolerance_of_its_own(
    student: torch.nn.Module, exported: Exported, data: Images, tmp_path: Path
) -> None:
    scaled = Exported(exported.path, target(tmp_path, "return run(x) * np.float32(1.002)"))
    assert "logits differ" in compare(student, scaled, data)["onnx"]["reason"]
    assert compare(student, replace(scaled, tolerance=5e-3), data)["onnx"]["pass"]


def test_a_tie_is_what_the_tolerance_may_turn_over_and_nothing_else() -> None:
    reference = np.array([[1.0, 1.00001, 0.0], [1.0, 2.0, 0.0]])
    tally = Tally()
    tally.agreement(np.array([[1.00001, 1.0, 0.0], [2.0, 1.0, 0.0]]), reference, tolerance=1e-4)
    assert (tally.compared, tally.agree, tally.ties) == (2, 0, 1)


def test_top5_counts_what_a_loop_counts() -> None:
    logits, labels = np.random.default_rng(0).standard_normal((50, 9)), np.arange(50) % 9
    tally = Tally()
    tally.score(logits, labels)
    assert tally.top5 == sum(labels[i] in sorted(range(9), key=lambda c: -logits[i, c])[:5] for i in range(50))


def test_a_backend_is_timed_in_a_process_of_its_own_without_torch(exported: Exported, tmp_path: Path) -> None:
    body = "assert 'torch' not in sys.modules and os.environ['OMP_NUM_THREADS'] == '1'; return run(x)"
    images = np.zeros((2, *SIZE), dtype=np.float32)
    module = target(tmp_path, body).__file__
    (row,) = measure_alone(module, exported.path, "cpu", images, [2], 1)
    assert row["batch"] == 2 and row["samples"] >= 30
    with pytest.raises(RuntimeError, match="IndexError"):
        module = target(tmp_path, "raise IndexError('no')").__file__
        measure_alone(module, exported.path, "cpu", images, [1], 1)


def test_waiting_for_others_is_told_and_the_collector_is_off_meanwhile() -> None:
    import time

    collecting = []

    def run(images: np.ndarray) -> None:
        collecting.append(gc.isenabled())
        time.sleep(0.002)

    (row,) = measure(run, np.zeros((1, 3, 4, 4)), [1], threads=1)
    assert row["contended"] is True and row["p50_ms"] >= 2
    assert gc.isenabled() and not any(collecting[-row["samples"] :])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot load /home/me/run/model.onnx: bad", "cannot load model.onnx: bad"),
        ("okdc compress --data /imagenet --model local-dir:/a/b", "okdc compress --data imagenet --model local-dir:b"),
        (r"C:\Users\me\model.onnx", "model.onnx"),
        ("see https://example.org/a and ../b/c, 3/4 or and/or", "see https://example.org/a and ../b/c, 3/4 or and/or"),
    ],
)
def test_paths_of_this_machine_are_cut_down(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_classes_are_counted_as_if_all_were_sorted() -> None:
    draw = np.random.default_rng(0)
    out = draw.integers(0, 4, (200, 9)).astype(np.float32)  # many are equal: of these the first comes first
    out[::7, 3] = np.nan
    labels = draw.integers(0, 10, 200)  # and some are of no class that there is
    best = np.argsort(-out, axis=1, kind="stable")[:, :5]
    tally = Tally()
    tally.count(out, labels)
    assert tally.top1 == (best[:, 0] == labels).sum() and 0 < tally.top1 < 100
    assert tally.top5 == (best == labels[:, None]).sum()
