"""Key points as a task: its losses and scores, every method that serves it, its batches, and a whole run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor, nn

from okdc import deploy, methods, networks, tasks
from okdc.anatomy import inspect
from okdc.cli.group import main
from okdc.cohort import Cohort
from okdc.comparing import compare
from okdc.data import load, open_source
from okdc.errors import DataError, RecipeError
from okdc.losses import kl
from okdc.methods import Method
from okdc.networks.pose_head import PoseNetwork
from okdc.pipeline.compression import compress
from okdc.recipe import DataSettings, ExportSettings, NetworkSettings
from okdc.tasks.pose import Pose
from okdc.tasks.shared import heatmaps
from okdc.tasks.shared.keypoint_scores import KeypointScore
from tests.helpers.networks import Tiny

SERVING = [name for name in methods.names() if "pose" in methods.get(name).tasks]
NAMES = ("nose", "left_ear", "right_ear")
SIZE = (3, 32, 32)


def pose(**noted: Any) -> Pose:
    task = tasks.get("pose", {"input_size": SIZE, **noted})
    assert isinstance(task, Pose)
    return task


class Maps(Tiny):
    """Three stages of convolutions and a map for each of three key points, at half of the images' size."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(32, 8, 4, 2, 1)
        self.head = nn.Conv2d(8, 3, 1)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.late(self.early(self.stem(x)))).relu())


class Stacked(Maps):
    """The same with maps of an earlier stage before its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        early = self.early(self.stem(x))
        return [self.first(early), self.head(self.up(self.late(early)).relu())]


def points(count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.cat([32 * torch.rand(count, 3, 2, generator=generator), torch.ones(count, 3, 1)], -1)


def build(name: str, network: type[nn.Module] = Maps) -> Method:
    torch.manual_seed(0)
    kind, target, images = methods.get(name), network(), torch.randn(2, *SIZE)
    task = pose()
    members = min(kind.members, 3)
    branches = kind.plan(inspect(target, images, task=task), members=members, extra_blocks=min(kind.extra_blocks, 1))
    cohort = Cohort(target, images, branches, taps=kind.taps, trunk_gradient=kind.trunk_gradient, task=task)
    return kind(cohort, **({"teacher": Maps()} if kind.needs_teacher else {}))


@pytest.mark.parametrize("name", SERVING)
def test_every_method_that_serves_it_teaches_all_of_its_parameters(name: str) -> None:
    method = build(name)
    method.epochs.fill_(2), method.epoch.fill_(1)
    learning = {key: p for key, p in method.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(method.param_groups(0.5), lr=0.5)
    parts = method.train()(torch.randn(6, *SIZE), points())
    sum(parts.values()).backward()
    assert all(value.isfinite() for value in parts.values())
    assert [key for key, p in learning.items() if p.grad is None] == []
    optimizer.step()
    outs = method.eval().cohort(torch.randn(2, *SIZE)).logits
    assert method.ensemble(method.cohort(torch.randn(2, *SIZE))).shape == outs[0].shape == (2, 3, 16, 16)
    assert not any(torch.equal(outs[0], other) for other in outs[1:])
    assert type(method.cohort.strip()) is Maps


def test_methods_for_classes_are_refused_with_those_that_serve_it() -> None:
    assert set(SERVING) == {"baseline", "kd", "dml", "one", "clilr", "oemc", "afd", "ahbf", "okddip", "ffl", "okdhp"}
    for name in sorted(set(methods.names()) - set(SERVING)):
        with pytest.raises(RecipeError, match=rf"{name} is no method for --task pose.*Those for pose: afd"):
            compress("resnet18", task="pose", method=name)
    with pytest.raises(RecipeError, match="okdhp is no method for --task classify"):
        compress("resnet18", method="okdhp")
    with pytest.raises(RecipeError, match=r"error is better when it is less.*looks for more: pck@0.1"):
        compare("test_resnet", task="pose", methods=["okdhp"], eval_metric="error")
    with pytest.raises(RecipeError, match="--mixup is not for --task pose: it would lay one animal over another"):
        compress("resnet18", task="pose", mixup=0.2)
    with pytest.raises(RecipeError, match=r"one gives \(2, 3, 4, 4\).*--task pose"):
        kl(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))


def test_of_a_list_of_maps_the_last_counts_and_the_others_learn_too() -> None:
    method = build("baseline", Stacked).train()
    parts = method(torch.randn(6, *SIZE), points())
    assert list(parts) == ["ce/target", "early1/target"]
    early = method.cohort(torch.randn(6, *SIZE)).earlier
    torch.testing.assert_close(early[0][0].shape, (6, 3, 16, 16))
    sum(parts.values()).backward()
    assert method.cohort.target.get_parameter("first.weight").grad is not None
    branched = build("one", Stacked)
    assert {"early1/target", "early1/branch1"} <= branched(torch.randn(6, *SIZE), points()).keys()


def test_losses_leave_out_what_has_no_label() -> None:
    task, labels, out = pose(), points(), torch.randn(6, 3, 8, 8)
    labels[:, 1, 2] = 0
    other = out.clone()
    other[:, 1] = torch.randn(6, 8, 8)
    torch.testing.assert_close(task.supervised(out, labels), task.supervised(other, labels))
    torch.testing.assert_close(task.distance(out, 2 * out, labels, 0.1), task.distance(other, 2 * out, labels, 0.1))
    labels[..., 2] = 0
    assert task.supervised(out, labels) == task.distance(out, -out, labels) == 0
    assert task.supervised(task.maps.targets(points(), (8, 8))[0], points()) == 0


def test_members_are_blended_each_point_by_weights_of_its_own() -> None:
    outs, weights = (torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)), torch.rand(2, 2, 3)
    expected = weights[:, 0, :, None, None] * outs[0] + weights[:, 1, :, None, None] * outs[1]
    torch.testing.assert_close(pose().blend(weights, outs), expected)
    torch.testing.assert_close(pose().blend(weights[:, :, 0], outs)[:, 0], expected[:, 0])


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (torch.zeros(4, dtype=torch.int64), r"shape \(4,\).*expected for each image and key point x and y"),
        (torch.zeros(4, 3, 2), r"Without weights: torch.cat"),
        (torch.zeros(4, 2, 3), r"a row for each of 3 key points"),
        (torch.full((4, 3, 3), float("nan")), "NaN or infinite"),
    ],
)
def test_labels_of_another_kind_are_refused(labels: Tensor, told: str) -> None:
    with pytest.raises(DataError, match=told):
        pose().checked_labels(labels, 4, "training", 3)


def test_scores_are_of_the_source_and_add_up_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    task, labels = pose(), points()
    moved = labels.clone()
    moved[:, 0, 0] += 4.0  # of 32, which the length is where nobody says another: beyond a tenth of it
    maps = heatmaps.render(moved, (16, 16), 2.0, 1.5)
    origin = torch.tensor([3.0, 96.0, 5000.0, 0.0]).expand(6, 3, 4)  # the source was three times as large
    scorer = task.scorer(3, 1)
    scorer.update(maps, torch.cat([labels, origin], -1), (maps,))
    found = scorer.value()
    inside = (labels[:, 0, 0] < 26).all()
    assert found["pck@0.1"] == pytest.approx(100 * 2 / 3, abs=6) or not inside
    assert scorer.others() == [found["pck@0.1"]]
    assert found["error"] == pytest.approx(float(KeypointScore.of(scorer.counts()).value()["error"]))
    rows = task.detail(scorer.counts(), NAMES)["points"]["rows"]
    assert rows[0]["error"] > 9 > rows[1]["error"] and [row["labelled"] for row in rows] == [6, 6, 6]

    parts = []
    for rank in range(2):
        half = task.scorer(3, 1)
        half.update(
            maps[3 * rank : 3 * rank + 3], torch.cat([labels, origin], -1)[3 * rank : 3 * rank + 3], (maps[:3],)
        )
        parts.append(half)
    told: list[list[Tensor]] = [[], []]
    monkeypatch.setattr("okdc.tasks.shared.point_scores.world", lambda: 2)
    for rank, half in enumerate(parts):  # what each process would send, first
        monkeypatch.setattr("okdc.tasks.shared.point_scores.rank", lambda rank=rank: rank)
        own = torch.zeros(2, dtype=torch.float64)
        own[rank] = half.images
        told[0].append(torch.cat([own, half.sums.flatten(), own.new_tensor([half.loss])]))
    monkeypatch.setattr("okdc.tasks.shared.point_scores.rank", lambda: 0)
    answers = iter([lambda x: sum(told[0]), lambda x: x])
    parts[0].add_up(lambda x: next(answers)(x))
    assert parts[0].images == 6
    assert parts[0].value()["pck@0.1"] == found["pck@0.1"] and parts[0].value()["loss"] == pytest.approx(found["loss"])


def test_images_of_a_loader_are_pictures_by_themselves_whatever_batch_they_came_in() -> None:
    pytest.importorskip("pycocotools", reason="OKS-AP needs pycocotools: pip install okdc[pose]")
    here, there = torch.tensor([[[20.0, 20.0, 1.0]]]), torch.tensor([[[70.0, 70.0, 1.0]]])
    task = Pose({"input_size": (3, 96, 96)})
    for first, second, expected in ((here, there, 100), (there, here, 0)):  # as if they were of one picture: 100
        scorer = task.scorer(1)
        for said, true in ((first, here), (second, there)):
            scorer.update(heatmaps.render(said, (24, 24), 4.0, 1.5), true)
        assert scorer.value()["ap"] == pytest.approx(expected, abs=1e-6)


def test_files_agree_on_points_that_move_less_than_half_a_pixel_of_the_map() -> None:
    tally, maps = pose().tally(), heatmaps.render(points(4) * 0.8 + 3, (16, 16), 2.0, 1.5).numpy()
    near = heatmaps.render((points(4) * 0.8 + 3) + torch.tensor([0.8, 0, 0]), (16, 16), 2.0, 1.5).numpy()
    far = heatmaps.render((points(4) * 0.8 + 3) + torch.tensor([1.2, 0, 0]), (16, 16), 2.0, 1.5).numpy()
    assert tally.same(near, maps).all() and not tally.same(far, maps).any()
    assert tally.same(near, maps).shape == (4, 3)
    two = maps.copy()
    two[0, 0] = 0
    two[0, 0, 2, 2], two[0, 0, 12, 12] = 1.0, 0.9999
    other = two.copy()
    other[0, 0, 12, 12] = 1.0001
    assert not tally.same(other, two)[0, 0] and tally.tied(other, two, 1e-3)[0, 0]
    tally.agreement(other, two, 1e-3)
    assert (tally.compared, tally.agree, tally.ties) == (12, 11, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO's layout: a bright disc on dark ground is the nose, two smaller ones beside it the ears."""
    root = tmp_path_factory.mktemp("mice")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        entries, images = [], []
        (root / "images").mkdir(exist_ok=True)
        for i in range(count):
            name = f"{split}{i}.png"
            x, y = (float(value) for value in random.integers(20, 44, 2))
            image = Image.new("RGB", (64, 64))
            pen = ImageDraw.Draw(image)
            flat: list[float] = []
            for off, ink in ((0, (255, 255, 255)), (-8, (255, 0, 0)), (8, (0, 0, 255))):
                pen.ellipse([x + off - 3, y - 3, x + off + 3, y + 3], ink)
                flat += [x + off, y, 2]
            image.save(root / "images" / name)
            images.append({"id": i, "file_name": name})
            box = [x - 12, y - 12, 24, 24]
            entries.append({"id": i, "image_id": i, "category_id": 1, "bbox": box, "area": 300, "keypoints": flat})
        category = {"id": 1, "name": "mouse", "keypoints": list(NAMES), "skeleton": [[1, 2], [1, 3]]}
        content = {"images": images, "annotations": entries, "categories": [category]}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def batched(folder: Path, **settings: Any) -> Any:
    source = open_source(DataSettings(data=str(folder), workers=0, **settings), 0, pose())
    config = {"input_size": SIZE, "mean": (0, 0, 0), "std": (1, 1, 1)}
    config |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    given = DataSettings(data=str(folder), workers=0, **settings)
    return load(source, given, config, batch_size=4, validation_batch_size=4, seed=0, device="cpu")


def brightest(image: Tensor) -> Tensor:
    """Where the white disc is, by the mean of its pixels: x, y."""
    white = image.min(0).values > 0.5
    return white.nonzero().float().mean(0).flip(0)


@pytest.mark.parametrize("settings", [{"hflip": 0.0}, {"hflip": 0.0, "no_aug": True}, {"hflip": 0.0, "boxes": "frame"}])
def test_points_go_where_the_image_goes_and_epochs_come_again(folder: Path, settings: dict[str, Any]) -> None:
    data = batched(folder, **settings)
    batches = list(data.train.batches(1))
    assert len(data.train) == len(batches) == 4 and data.classes == NAMES
    for images, labels in [*batches, *data.validation]:
        assert labels.shape == (len(images), 3, 7)
        for image, label in zip(images, labels, strict=True):
            torch.testing.assert_close(brightest(image), label[0, :2], atol=1.0, rtol=0)
    again = list(data.train.batches(1, start=2))
    assert torch.equal(again[0][0], batches[2][0]) and torch.equal(again[1][1], batches[3][1])
    other = next(data.train.batches(2))
    assert not torch.equal(other[1], batches[0][1])
    scale, length, area, _ = next(iter(data.validation))[1][0, 0, 3:].tolist()
    whole = settings.get("boxes") == "frame"
    assert (scale, length, area) == pytest.approx((2.0, 64, 300) if whole else (1.25 * 24 / 32, 24, 300))
    assert data.name.endswith(f"boxes {settings.get('boxes', 'given')}")


def test_a_mirror_swaps_sides_and_needs_to_know_them(folder: Path) -> None:
    with pytest.raises(DataError, match="--flip-pairs left_ear/right_ear"):
        batched(folder, hflip=0.5)
    data = batched(folder, hflip=1.0, rotation=0.0, flip_pairs="left_ear/right_ear")
    images, labels = next(data.train.batches(0))
    assert (labels[:, 1, 0] < labels[:, 2, 0]).all()  # as in every image that was not mirrored
    x, y = labels[0, 1, :2].round().long().tolist()
    assert images[0, 2, y, x] > 0.5 > images[0, 0, y, x]  # and what is blue, a right ear, is now a left one


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("runs")
    words = ["compress", "--task", "pose", "--data", str(folder), "--model", "test_resnet", "--img-size"]
    words += ["32", "-b", "4", "-j", "0", "--epochs", "1", "--output", str(output), "--batch-sizes", ""]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert "key points" in done.output and "boxes given" in done.output
    yield output / f"test_resnet-okdhp-{folder.name}"


def test_a_run_of_the_command_line_ends_in_a_bundle_that_says_what_its_maps_are(run: Path, folder: Path) -> None:
    bundle = run / "export" if (run / "export").is_dir() else run / "export-failed"
    known = json.loads((bundle / "keypoints.json").read_text())
    assert known == {
        "names": list(NAMES), "skeleton": [[0, 1], [0, 2]], "pairs": [], "sigmas": [0.05] * 3, "stride": 4.0,
        "input": [32, 32], "sigma": 1.5, "decoding": "log-parabola", "boxes": "given", "margin": 1.25,
    }  # fmt: skip
    config = json.loads((bundle / "config.json").read_text())
    assert config["okdc"]["loader"] == "timm" and config["okdc"]["head"] == {"head": "deconv", "width": 64}
    student = deploy.bundle.load_student(bundle)
    assert isinstance(student, PoseNetwork)
    inputs, maps = deploy.bundle.read_golden(bundle)
    torch.testing.assert_close(student(torch.from_numpy(inputs)).detach(), torch.from_numpy(maps), atol=1e-5, rtol=1e-4)
    assert deploy.task_of(bundle).facts()["keypoints"]["skeleton"]["names"] == list(NAMES)
    rows = {row["name"]: row for row in json.loads((bundle / "verification.json").read_text())["rows"]}
    assert {"torch", "onnx", "predict.py"} == rows.keys()  # which crops as training does
    assert rows["onnx"]["agreement"] == rows["predict.py"]["agreement"] == 100.0
    report = json.loads((run / "report.json").read_text())
    assert len(report["pictured"]) == 4  # of the first batch
    assert report["points"]["boxes"] == "given" and report["data"]["name"] == f"{folder.name}, boxes given"
    assert "3 key points" in (bundle / "README.md").read_text()
    text = (run / "report.md").read_text()
    assert "## Key points" in text and "\u00a0px |" in text


def test_a_run_is_the_beginning_of_another(run: Path) -> None:
    network = networks.load(NetworkSettings(model=str(run)), 3)
    assert isinstance(network, PoseNetwork) and network.made["width"] == 64


def test_of_a_network_that_gives_a_list_the_last_maps_ship(tmp_path: Path) -> None:
    network, settings = Stacked(), ExportSettings(batch_sizes=[])
    given: dict[str, Any] = {"arch": "Stacked", "preprocess": {"input_size": SIZE}, "classes": NAMES, "task": pose()}
    found = deploy.export_bundle(network, None, settings, tmp_path / "export", **given)
    assert found["verdict"] == "parity_only"
    inputs, maps = deploy.bundle.read_golden(tmp_path / "export")
    torch.testing.assert_close(
        network.eval()(torch.from_numpy(inputs))[-1].detach().numpy(), maps, atol=1e-5, rtol=1e-4
    )
    saved = load_file(tmp_path / "export" / "model.safetensors")
    assert saved.keys() == network.state_dict().keys()


def test_int8_is_calibrated_on_plain_crops_and_leaves_the_last_convolution_in_float(
    folder: Path, tmp_path: Path
) -> None:
    images, facts = deploy.calibration.draw(batched(folder, hflip=0.0), 6)
    assert images.shape == (6, *SIZE) and not facts["augmented"]
    target = deploy.targets.find("onnx_int8").module
    torch.manual_seed(0)
    told = target.write(Maps().eval(), torch.zeros(2, *SIZE), tmp_path / "int8.onnx", calibration=images, enough=0.0)
    assert len(told["kept_in_float"]) == 1 and told["layers"] == 5
    assert target.runner(tmp_path / "int8.onnx").precisions == {"fp32": 1, "int8": 4}
