"""The whole road as a user takes it: compress, strip, export, verify, predict; and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import sklearn.utils
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import okdc
import okdc.networks
from okdc import deploy, methods, pipeline
from okdc.cli import main
from okdc.deploy import targets
from okdc.errors import DataError, ExportError, NetworkError, RecipeError, RunError
from okdc.pipeline import delivering, run_folder
from okdc.recipe import Recipe, override, resolve
from okdc.training import checkpoint
from tests.helpers.networks import Tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
FAST = {"epochs": 1, "batch_size": 16, "workers": 0, "img_size": 32, "crop_padding": 2, "hflip": 0.0, "lr": 0.05}
QUICK_EXPORT = {"batch_sizes": [1]}
DIGITS = sklearn.datasets.load_digits()
FEWER_DIGITS = sklearn.utils.Bunch(**DIGITS | {"images": DIGITS.images[:450], "target": DIGITS.target[:450]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of coloured squares on noise, as train/ and val/ of class folders."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 80, (40, 36, 3), dtype=np.uint8)
                pixels[8:30, 8:30, channel] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


# One thread: sums are rounded differently on two, and a run is compared with another to the last bit.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def command(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "okdc", *map(str, words)]
    return subprocess.run(line, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def here(*words: str | Path) -> Result:
    """A command in this process: another one would import torch again."""
    return CliRunner().invoke(main, [*map(str, words)])


def flags(**settings: object) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One finished `okdc compress` of the command line, and what it printed."""
    place = tmp_path_factory.mktemp("work")
    words = ["compress", "--model", "resnet20_cifar", "--method", "ahbf", "--data", folder, "--experiment", "first"]
    done = command(*words, *flags(**FAST | {"epochs": 5, "batch_size": 8, "members": 3, "extra_blocks": 1}), cwd=place)
    assert done.returncode == 0, done.stderr
    return place / "runs" / "first", done


def test_the_whole_road(run: tuple[Path, subprocess.CompletedProcess[str]], folder: Path) -> None:
    path, done = run
    assert "Student" in done.stdout and "predict.py" in done.stdout
    facts = json.loads((path / "report.json").read_text())
    assert facts["verification"]["verdict"] == "pass" and facts["metrics"]["top1"] > 60
    assert [m["name"] for m in facts["members"]] == ["target", "branch1", "branch2"]
    assert facts["members"][0]["params"] < facts["trained_params"]
    rows = {row["name"]: row for row in facts["verification"]["rows"]}
    assert rows["onnx"]["top1"] == rows["torch"]["top1"] == rows["predict.py"]["top1"]
    for name in ("report.html", "report.md", "summary.csv", "last.pth.tar", "model_best.pth.tar", "recipe.yaml"):
        assert (path / name).stat().st_size > 100
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    assert events.Tensors("verification/text_summary")[0].tensor_proto.string_val == [b"pass"]
    again = here("verify", path)
    assert again.exit_code == 0, again.output
    images = sorted((folder / "val" / "red").iterdir())
    said = subprocess.run(
        [sys.executable, path / "export" / "predict.py", "--json", *images], capture_output=True, text=True, check=True
    )
    best = [json.loads(line)["predictions"][0]["label"] for line in said.stdout.splitlines()]
    student = timm.create_model(f"local-dir:{path / 'export'}", pretrained=True).eval()
    transform = timm.data.create_transform(**facts_preprocess(path), is_training=False)
    assert json.loads((path / "export" / "config.json").read_text())["okdc"]["images"] == {"exif": True}
    with torch.no_grad():
        torch_says = student(torch.stack([transform(Image.open(image)) for image in images])).argmax(1)
    assert best == [("blue", "green", "red")[i] for i in torch_says.tolist()]


def test_a_bundle_that_is_exported_again_knows_what_it_knew(
    run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    before, again = run[0] / "export", tmp_path / "again"
    assert okdc.export(before, output=again, batch_sizes=[])["verdict"] == "parity_only"
    for name in ("labels.txt", "preprocess.json", "model.safetensors"):
        assert (again / name).read_bytes() == (before / name).read_bytes(), name
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (before, again))
    assert one["architecture"] == other["architecture"] and one["okdc"]["images"] == other["okdc"]["images"]


def facts_preprocess(path: Path) -> dict:
    return json.loads((path / "export" / "preprocess.json").read_text())


def test_the_best_checkpoint_loads_in_plain_timm(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    path, _ = run
    weights = torch.load(path / "model_best.pth.tar", weights_only=True)["state_dict"]
    network = timm.create_model("resnet20_cifar", num_classes=3, checkpoint_path=str(path / "model_best.pth.tar"))
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())


def test_export_again_and_a_missing_tensorrt(
    run: tuple[Path, subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = run
    monkeypatch.chdir(path.parents[1])
    line = ["export", path, "--onnx", "--batch-sizes", "1", "--output", "deploy"]
    done = here(*line, "--torch")
    assert done.exit_code == 0, done.output
    assert (path.parents[1] / "deploy" / "model.pt2").is_file()
    done = here(*line, "--trt")
    has_tensorrt = targets.find("tensorrt").module.available() is None
    assert done.exit_code == (0 if has_tensorrt else 2) and isinstance(done.exception, SystemExit | None), done.output
    assert (path.parents[1] / "deploy" / "model.engine").is_file() is has_tensorrt
    assert has_tensorrt or "tensorrt" in done.stderr.lower()
    assert (path.parents[1] / "deploy" / "model.onnx").is_file()


@pytest.mark.usefixtures("one_thread")
def test_killed_and_resumed_is_as_if_nothing_had_happened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["compress", "--model", "resnet20_cifar", "--method", "dml", "--data", str(folder), "--no-onnx"]
    words += flags(**FAST | {"epochs": 4, "recovery_interval": 2, "workers": 2})
    monkeypatch.chdir(tmp_path)
    straight = here(*words, "--experiment", "straight")
    assert straight.exit_code == 0, straight.output
    line = [sys.executable, "-m", "okdc", *words, "--experiment", "killed"]
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(line, cwd=tmp_path, env=ENVIRONMENT, **quiet)
    last = tmp_path / "runs" / "killed" / "last.pth.tar"
    while process.poll() is None and not last.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    blocked = here(*words, "--experiment", "killed")
    assert blocked.exit_code == 2 and "--resume auto" in blocked.stderr and "--experiment NAME" in blocked.stderr
    resumed = here(*words, "--experiment", "killed", "--resume", "auto")
    assert resumed.exit_code == 0, resumed.output
    mine, theirs = (checkpoint.load(tmp_path / "runs" / n / "last.pth.tar") for n in ("killed", "straight"))
    assert all(torch.equal(v, theirs["state_dict"][k]) for k, v in mine["state_dict"].items())
    assert mine["metric"] == theirs["metric"]


def test_any_module_and_any_iterable(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(48, 3, 32, 32), torch.arange(48) % 4
    network, keys = Tiny(), list(Tiny().state_dict())
    loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)
    batches = [(images[:20], labels[:20])]
    result = okdc.compress(
        network, loader, batches, method="ahbf", members=2, extra_blocks=1, epochs=1, output=tmp_path, onnx=False
    )
    assert result.student is network and list(network.state_dict()) == keys and result.verification is None
    assert 0 <= result.metrics["top1"] <= 100 and not network.training
    verification = result.export(onnx=True, **QUICK_EXPORT)
    assert verification["verdict"] == "pass" and (result.path / "export" / "model.onnx").is_file()
    with pytest.raises(NetworkError, match=r"cannot be built again.*\.export\(\)"):
        okdc.export(result.path)


LOCK = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
sys.stdin.read()
"""


def lock(folder: Path, **options: int) -> subprocess.Popen[str]:
    """Another process that has the lock of a run folder, if it can be had."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", LOCK, folder / ".lock"], stdin=pipe, stdout=pipe, text=True, **options
    )


def test_a_run_folder_is_ones_own_until_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 4
    taken = []

    def probe(*_: object, **__: object) -> dict[str, str]:
        said, _ = lock(tmp_path / "run", stderr=subprocess.DEVNULL).communicate()
        taken.append(said == "")
        return {}

    monkeypatch.setattr(deploy, "export_bundle", probe)
    monkeypatch.setattr(delivering.report, "write", probe)
    result = okdc.compress(Tiny(), [(images, labels)], method="baseline", epochs=1, output=tmp_path, experiment="run")
    result.export()
    okdc.export(Tiny(), output=result.path / "export")
    assert taken == [True] * 4
    holder = lock(result.path)
    assert holder.stdout and holder.stdout.readline() == "locked\n"
    for export in (result.export, lambda: okdc.export(Tiny(), output=result.path / "export")):
        with pytest.raises(RunError, match=r"run is in use by .*--output DIR for an export"):
            export()
    holder.communicate()
    assert len(taken) == 4


def test_without_validation_the_last_weights_ship(tmp_path: Path) -> None:
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 4
    loader = [(images[:16], labels[:16]), (images[16:], labels[16:])]
    export = {"onnx": False, "triton": True} | QUICK_EXPORT  # which model.onnx is written for
    result = okdc.compress(Tiny(), loader, method="baseline", epochs=2, output=tmp_path, **export)
    assert result.metrics["top1"] is None and result.verification["verdict"] == "parity_only"
    assert (result.path / "export" / "triton" / "Tiny" / "1" / "model.onnx").is_file()
    last = checkpoint.load(result.path / "last.pth.tar")["state_dict"]
    assert all(torch.equal(v, last[k]) for k, v in result.student.state_dict().items())
    with pytest.raises(ExportError, match=r"--val-split of which data.* --data DIR"):
        pipeline.verify(result.path, val_split="test")
    again = pipeline.verify(result.path)  # the loader's images are gone
    assert again["verdict"] == "parity_only" and all(row["pass"] for row in again["rows"])


def test_the_report_names_the_control_beside_it(tmp_path: Path) -> None:
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 4
    loader = [(images, labels)]
    for method in ("baseline", "dml"):
        result = okdc.compress(Tiny(), loader, loader, method=method, epochs=1, output=tmp_path, onnx=False)
    facts = json.loads((result.path / "report.json").read_text())
    assert facts["baseline"]["name"] == "Tiny-baseline-loader"


def test_members_of_another_architecture(folder: Path, tmp_path: Path) -> None:
    result = okdc.compress(
        "resnet20_cifar", data=str(folder), method="dml", peers=["test_vit"], output=tmp_path, onnx=False,
        **FAST, members=2,
    )  # fmt: skip
    facts = json.loads((result.path / "report.json").read_text())
    assert facts["members"][1]["role"] == "VisionTransformer"


def test_a_trained_teacher(run: tuple[Path, subprocess.CompletedProcess[str]], folder: Path, tmp_path: Path) -> None:
    """A run, or a checkpoint that names its network; one that knows other classes is refused."""
    common = {"data": str(folder), "method": "kd", "output": tmp_path, "onnx": False, **FAST}
    for teacher in (run[0], run[0] / checkpoint.BEST):
        result = okdc.compress("resnet20_cifar", teacher=str(teacher), **common)
    facts = json.loads((result.path / "report.json").read_text())
    assert [m["name"] for m in facts["members"]] == ["target"]
    assert facts["trained_params"] == facts["network"]["params"]
    loader = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)]
    with pytest.raises(NetworkError, match=r"knows 3 classes and the network is to know 4"):
        okdc.compress(Tiny(), loader, method="kd", teacher=str(run[0]), output=tmp_path)
    unnamed = tmp_path / "weights.pth"
    torch.save({"state_dict": {}}, unnamed)
    with pytest.raises(NetworkError, match="does not say which network"):
        okdc.compress("resnet20_cifar", teacher=str(unnamed), **common)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"method": "kd"}, RecipeError, "--teacher runs/NAME"),
        ({"teacher": "resnet18"}, RecipeError, "ahbf takes no teacher"),
        ({"method": "kd", "teacher": "resnet81"}, NetworkError, "Did you mean resnet"),
        ({"model": "resnet81"}, NetworkError, "Did you mean resnet"),
        ({"method": "ahbv"}, RecipeError, "Did you mean ahbf"),
        ({"data": "/nowhere/at/all"}, DataError, "/nowhere/at/all"),
        ({"cut": "layer9"}, NetworkError, "Good cuts: .*the default"),
        ({"peers": ["resnet20_cifar"], "members": 3}, RecipeError, "Leave out --members"),
        ({"peers": ["resnet20_cifar"], "cut": "layer2"}, RecipeError, "--cut cannot apply with --peers"),
        ({"share": "none", "cut": "layer2"}, RecipeError, "--cut cannot apply with --share none"),
        ({"method": "dml", "cut": "layer2"}, RecipeError, "--cut has no effect here"),
        ({"method": "one", "extra_blocks": 2}, RecipeError, "as deep as the target"),
        ({"method": "baseline", "members": 3}, RecipeError, "baseline trains the network without other members"),
        ({"img_size": 4, "model": "vgg11_bn"}, NetworkError, "--img-size"),
        ({"epohcs": 3}, RecipeError, "Did you mean epochs"),
        ({"method_kwargs": {"temprature": 3}}, RecipeError, "temperature"),
    ],
)
def test_mistakes_are_named(settings: dict, kind: type[Exception], words: str, folder: Path, tmp_path: Path) -> None:
    given = {"model": "resnet20_cifar", "data": str(folder), **FAST, **settings}
    with pytest.raises(kind, match=words):
        okdc.compress(**given, output=tmp_path)
    assert list(tmp_path.iterdir()) == [], "a run that never began leaves nothing behind"


def test_a_mistake_found_late_does_not_use_the_name_up(folder: Path, tmp_path: Path) -> None:
    given = {"model": "resnet20_cifar", "data": str(folder), **FAST, "method": "baseline", "output": tmp_path}
    with pytest.raises(RecipeError, match=r"no optimizer 'sdg'.*Did you mean sgd"):
        okdc.compress(**given, opt="sdg", experiment="mine")
    assert not (tmp_path / "mine").exists()


def test_another_method_builds_its_own_cohort() -> None:
    wanted = resolve(flat={"method": "baseline"}, method_settings=methods.settings)
    assert (wanted.data.data, wanted.cohort.members, wanted.cohort.extra_blocks) == ("digits", None, None)
    wanted = resolve("cifar100/resnet32-ahbf", flat={"method": "dml", "members": 3}, method_settings=methods.settings)
    assert (wanted.cohort.members, wanted.cohort.extra_blocks) == (3, None)


def test_what_fails_on_the_way_leaves_the_users_network_as_it_was(tmp_path: Path) -> None:
    network = Tiny().train()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match="cannot make the run folder"):
        okdc.compress(network, [(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)], output=tmp_path / "file", members=2)
    assert network.training and not any(m._forward_hooks for m in network.modules())
    frozen = Tiny().requires_grad_(False)
    with pytest.raises(NetworkError, match="nothing to train"):
        okdc.compress(frozen, [(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)], output=tmp_path)


def test_a_last_batch_of_one_image_is_left_out(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.randn(17, 3, 32, 32), torch.arange(17) % 4), batch_size=8)
    result = okdc.compress(Tiny(), loader, method="ahbf", members=2, epochs=2, output=tmp_path, onnx=False)
    assert len((result.path / "summary.csv").read_text().splitlines()) == 3


def test_a_network_with_other_classes(tmp_path: Path) -> None:
    loader = [(torch.randn(8, 3, 32, 32), torch.arange(8))]
    with pytest.raises(DataError, match=r"4 outputs.*8 classes"):
        okdc.compress(Tiny(), loader, method="baseline", output=tmp_path)


def test_a_checkpoint_of_another_network(run: tuple[Path, subprocess.CompletedProcess[str]], folder: Path) -> None:
    path, _ = run
    before = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    done = here("compress", "--model", "resnet32_cifar", "--resume", path)
    assert done.exit_code == 2 and "resnet20_cifar" in done.stderr and isinstance(done.exception, SystemExit)
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()} == before


def test_a_path_alone_is_enough_to_go_on(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    path, _ = run
    rows = len((path / "summary.csv").read_text().splitlines())
    done = here("compress", "--resume", path / "last.pth.tar", "--epochs", "6", "--no-onnx")
    assert done.exit_code == 0, done.output
    assert len((path / "summary.csv").read_text().splitlines()) == rows + 1
    assert "epochs: 6" in (path / "recipe.yaml").read_text()


def test_folders_are_never_written_over(tmp_path: Path) -> None:
    wanted = override(Recipe(), {"model": "torchvision/resnet18", "data": "/data/cats"})
    first, last = run_folder.choose(tmp_path, wanted, None, None)
    assert (first.name, last) == ("resnet18-ahbf-cats", None)
    with ExitStack() as held:
        run_folder.begin(first, wanted, {"arch": "x"}, held)
    assert run_folder.choose(tmp_path, wanted, None, None) == (first, None), "nothing was trained in it"
    assert run_folder.choose(tmp_path, wanted, None, "auto") == (first, None), "killed before its first checkpoint"
    (first / "last.pth.tar").write_text("weights")
    with pytest.raises(RunError, match=r"unfinished run.*--resume auto.*--experiment NAME"):
        run_folder.choose(tmp_path, wanted, None, None)
    assert run_folder.choose(tmp_path, wanted, None, "auto") == (first, first / "last.pth.tar")
    (first / "report.json").write_text("{}")
    second, _ = run_folder.choose(tmp_path, wanted, None, None)
    assert second.name == "resnet18-ahbf-cats-2"
    assert run_folder.choose(tmp_path, wanted, None, "auto")[0] == first, "the newest that there is"
    with pytest.raises(RunError, match="holds a finished run"):
        run_folder.choose(tmp_path, wanted, first.name, None)
    (first / "last.pth.tar").rename(first / "last.1.pth.tar")
    assert run_folder.choose(tmp_path, wanted, None, "auto")[1] == first / "last.pth.tar", (
        "the one kept before it will do"
    )
    (first / "last.1.pth.tar").rename(first / "model_best.pth.tar")
    with pytest.raises(RunError, match=r"holds files but no last\.pth\.tar"):
        run_folder.choose(tmp_path, wanted, None, "auto")
    with pytest.raises(RunError, match=r"there is no .*last\.pth\.tar"):
        run_folder.choose(tmp_path, wanted, None, str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("name", ["quickstart", "own_network", "own_method", "own_data"])
def test_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if name != "own_network":  # which counts on all of them
        monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: FEWER_DIGITS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "top-1" in capsys.readouterr().out


def test_the_deployment_example(run: tuple[Path, subprocess.CompletedProcess[str]], folder: Path) -> None:
    image = next((folder / "val" / "red").iterdir())
    line = [sys.executable, EXAMPLES / "deploy_onnx.py", run[0] / "export", image]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{image.name}: ")


def test_the_readmes_own_method_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    block = readme.partition("**A method of your own**")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "my_module.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    words = ["compress", "--method", "my_module:Consensus", "--model", "resnet20_cifar", "--data", "digits"]
    words += [*flags(**FAST | {"batch_size": 128, "img_size": 16}), "--no-onnx", "--experiment", "own"]
    for more in ([], ["--resume", "auto", "--epochs", "2"]):
        done = CliRunner().invoke(main, [*words, *more], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        facts = json.loads((tmp_path / "runs" / "own" / "report.json").read_text())
        assert facts["method"]["summary"] == "Consensus has no docstring."
    assert len(facts["history"]) == 2 and {"loss/ce/0", "loss/ce/2"} <= set(facts["history"][1])


def test_every_example_is_run_here() -> None:
    found = {file.stem for file in EXAMPLES.glob("*.py")}
    assert found == {"quickstart", "own_network", "own_method", "own_data", "deploy_onnx"}


def test_the_student_of_a_classifier_in_a_module_stays_trained_when_a_gate_fails(tmp_path: Path) -> None:
    class Unsteady(Tiny):
        """Not the same twice, once it was trained: an export of it cannot agree."""

        trained = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.trained |= self.training
            noise = torch.rand(len(x), 1, device=x.device) if self.trained and not self.training else 0.0
            return super().forward(x) * (1 - 2 * noise)

    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 4
    loader = [(images, labels)]
    network: nn.Module = Unsteady()
    before = network.head.weight.detach().clone()
    with pytest.raises(okdc.OkdcError) as caught:
        okdc.compress(network, loader, loader, method="baseline", epochs=1, output=tmp_path, **QUICK_EXPORT)
    assert caught.value.exit_code == 3
    assert not torch.equal(network.head.weight, before)
    path = tmp_path / "Unsteady-baseline-loader"
    assert (path / "model_best.pth.tar").is_file() and (path / "report.html").is_file()
    assert json.loads((path / "report.json").read_text())["verification"]["verdict"] == "fail"
    assert not (path / "export").exists() and (path / "export-failed" / "model.safetensors").is_file()
