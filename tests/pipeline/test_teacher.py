"""A teacher is tried before anything is trained: it must know the classes, and more than guessing would."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import okdc
from okdc import networks
from okdc.data import Data, wrap
from okdc.errors import DataError, NetworkError, RecipeError
from okdc.pipeline import teachers
from okdc.recipe import CohortSettings, NetworkSettings
from tests.helpers.networks import Tiny

CPU = torch.device("cpu")


class Knows(nn.Module):
    """Reads the class off the first pixel; `shift` makes it name the next class instead."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.shift, self.seen = shift, 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        named = (images[:, 0, 0, 0].round().long() + self.shift) % 4
        return nn.functional.one_hot(named, 4).float() + self.unused


def batches(count: int, size: int = 20) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(size) % 4
    images = torch.randn(size, 3, 8, 8)
    images[:, 0, 0, 0] = labels.float()
    return [(images, labels)] * count


def data(count: int = 3) -> Data:
    return wrap(batches(2), batches(count), num_classes=4)


def test_a_good_teacher_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    images, state = data(), torch.get_rng_state()
    teachers.check_accuracy(Knows().train(), "runs/good", images, CPU, 0)
    assert capsys.readouterr().err == "Teacher runs/good: top-1 100.00% of 60 validation images.\n"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("teacher", [Knows(shift=1), Tiny().requires_grad_(False)], ids=["other order", "untrained"])
def test_a_teacher_that_guesses_is_refused(teacher: nn.Module) -> None:
    for p in teacher.parameters():
        nn.init.zeros_(p)  # then Tiny names one class, whatever it sees
    with pytest.raises(NetworkError, match=r"runs/bad is right on \d+\.0% of 60 .* guessing would be on 25\.0%"):
        teachers.check_accuracy(teacher, "runs/bad", data(), CPU, 0)


def test_not_all_images_are_needed_and_there_may_be_none(capsys: pytest.CaptureFixture[str]) -> None:
    network = Knows()
    teachers.check_accuracy(network, "runs/good", data(200), CPU, 0)
    assert network.seen == teachers.ENOUGH
    teachers.check_accuracy(network, "runs/good", wrap(batches(2), num_classes=4), CPU, 0)
    assert network.seen == teachers.ENOUGH and capsys.readouterr().err.count("\n") == 1


def test_images_that_stop_coming_end_the_trial() -> None:
    class Stops(list):
        """Batches of which the second never comes, once `stopped`."""

        stopped = False

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in super().__iter__():
                yield batch
                time.sleep(60 if self.stopped else 0)

    validation = Stops(batches(3))
    images = wrap(batches(2), validation, num_classes=4)
    validation.stopped = True
    with pytest.raises(DataError, match=r"no image came for 0\.2 seconds while the teacher looked at .* batch 2\."):
        teachers.check_accuracy(Knows(), "runs/good", images, CPU, timeout=0.2)


def test_a_teacher_for_a_method_that_takes_none() -> None:
    with pytest.raises(RecipeError, match="use --method kd or sokd"):
        teachers.check(CohortSettings(teacher="runs/x"), "ahbf", needed=False)
    with pytest.raises(RecipeError, match="sokd copies a trained network and was given none"):
        teachers.check(CohortSettings(), "sokd", needed=True)


@pytest.mark.parametrize("method", ["kd", "sokd"])
def test_the_whole_way(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of the user's own code may teach the same code, which was typed; one that knows nothing may not."""
    monkeypatch.chdir(Path(__file__).parents[2])
    loaders = DataLoaders()
    common = {"output": tmp_path, "epochs": 3, "lr": 0.05, "onnx": False, "model": "tests.helpers.networks:Tiny"}
    okdc.compress(loader=loaders.train, validation=loaders.validation, method="baseline", experiment="t", **common)
    teacher = str(tmp_path / "t")
    capsys.readouterr()
    result = okdc.compress(
        loader=loaders.train, validation=loaders.validation, method=method, teacher=teacher, experiment="s", **common
    )
    assert f"Teacher {teacher}: top-1" in capsys.readouterr().err
    assert set(result.byproducts) == ({"bridge"} if method == "sokd" else set())
    other = [(images, (labels + 1) % 4) for images, labels in loaders.validation]
    with pytest.raises(NetworkError, match="guessing would be"):
        okdc.compress(loader=loaders.train, validation=other, method=method, teacher=teacher, experiment="no", **common)
    assert not (tmp_path / "no").exists()
    common["model"] = "resnet20_cifar"
    with pytest.raises(NetworkError, match=r"give a function of yours that loads it, as package\.module:function"):
        okdc.compress(loader=loaders.train, method=method, teacher=teacher, experiment="no", **common)


class DataLoaders:
    """Four classes that differ in the brightness of a corner."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(64) % 4
        images = torch.randn(64, 3, 32, 32, generator=generator) * 0.3 + labels.view(-1, 1, 1, 1) - 1.5
        self.train = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 64, 16)]
        self.validation = self.train[:2]


def ends_in_a_softmax() -> nn.Module:
    return nn.Sequential(Tiny(), nn.Softmax(1))


def test_a_teacher_that_ends_in_a_softmax_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its student would learn from a softmax of a softmax, in which all classes are nearly alike."""
    monkeypatch.chdir(Path(__file__).parents[2])
    name = f"{__name__}:ends_in_a_softmax"
    with pytest.raises(NetworkError, match=r"the teacher .* ends in a softmax.* a second time.* in place of '1'"):
        teachers.load(name, (3, 16, 16), 4, name)
    name = "tests.helpers.networks:Tiny"
    assert isinstance(teachers.load(name, (3, 16, 16), 4, name), Tiny)


def test_a_file_that_names_its_network_may_call_the_weights_what_it_likes(tmp_path: Path) -> None:
    trained, file = networks.load(NetworkSettings(model="resnet20_cifar"), 4), tmp_path / "teacher.pth"
    held = trained.state_dict()
    for content in ({"net": held, "acc": 91.0}, {"net": {f"module.{key}": value for key, value in held.items()}}):
        torch.save({**content, "arch": "resnet20_cifar"}, file)
        found = teachers.load(str(file), (3, 32, 32), 4).state_dict()
        assert all(torch.equal(found[key], value) for key, value in held.items())
    torch.save({"net": held}, file)
    with pytest.raises(NetworkError, match=r"does not say which network .*--teacher package\.module:function"):
        teachers.load(str(file), (3, 32, 32), 4)
