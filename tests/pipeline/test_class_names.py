"""Classes are matched by name, not by their number: in a run that goes on, and between a teacher and its data."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import okdc
from okdc.data import wrap
from okdc.errors import DataError, NetworkError, RunError
from okdc.pipeline import assemble, run_folder, teachers
from okdc.recipe import Recipe, override
from tests.helpers.networks import Tiny

NAMES = ["cherry", "fig", "lemon", "plum"]
SETTINGS = {"model": "tests.helpers.networks:Tiny", "lr": 0.1, "batch_size": 16, "onnx": False, "device": "cpu"}


class Loader(list):
    """Batches of four kinds of images, whose labels are places in `names`."""

    def __init__(self, names: list[str]) -> None:
        draw = torch.Generator().manual_seed(0)
        kinds = torch.arange(64) % 4
        images = torch.randn(64, 3, 16, 16, generator=draw) * 0.3 + kinds.view(-1, 1, 1, 1) - 1.5
        place = torch.tensor([names.index(name) if name in names else i for i, name in enumerate(NAMES)])
        super().__init__(zip(images.split(16), place[kinds].split(16)))
        self.dataset = SimpleNamespace(classes=names)


def train(names: list[str], folder: Path, **settings: object) -> okdc.Result:
    loader = Loader(names)
    settings = {"method": "baseline", "epochs": 3, "output": folder} | SETTINGS | settings
    return okdc.compress(loader=loader, validation=loader, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> okdc.Result:
    """A finished run that learned NAMES in this order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        return train(NAMES, tmp_path_factory.mktemp("runs"), experiment="teacher", epochs=8)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["cherry", "fig", "lemon", "quince"], "'plum' only in the run; 'quince' only in the data"),
        (["fig", "cherry", "lemon", "plum"], "number 0 is 'cherry' in the run and 'fig' in the data"),
    ],
)
def test_a_run_does_not_go_on_with_classes_of_other_names(run: okdc.Result, names: list[str], told: str) -> None:
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with pytest.raises(RunError, match=f"{told}.*--class-map FILE.*--experiment NAME.*model_best") as caught:
        train(names, run.path.parent, experiment="teacher", resume="auto", epochs=9)
    assert "teacher learned" in str(caught.value)
    assert {name: (run.path / name).read_bytes() for name in before} == before


def test_a_run_goes_on_with_its_own_classes(run: okdc.Result, tmp_path: Path) -> None:
    train(NAMES, tmp_path, experiment="same", epochs=1)
    resumed = train(NAMES, tmp_path, experiment="same", resume="auto", epochs=2)
    assert resumed.metrics["epochs"] == 2
    unnamed = list(Loader(NAMES))  # whose classes are numbers, for want of names
    settings = {"method": "baseline", "output": tmp_path, "experiment": "same", "resume": "auto"} | SETTINGS
    assert okdc.compress(loader=unnamed, validation=unnamed, epochs=3, **settings).metrics["epochs"] == 3


def test_numbers_are_names_where_they_are_those_of_folders(tmp_path: Path) -> None:
    (tmp_path / "last.pth.tar").touch()
    (tmp_path / "student.json").write_text(json.dumps({"classes": ["0", "1"]}))
    recipe = override(Recipe(), {"data": "photos"})
    with ExitStack() as held, pytest.raises(RunError, match="'0' only in the run; '2' only in the data"):
        run_folder.begin(tmp_path, recipe, {"classes": ["1", "2"]}, held)


def test_a_validation_loader_of_other_classes_is_refused() -> None:
    """As torchvision's ImageFolder numbers them where a class has no folder in val/."""
    for names, told in (
        (NAMES[1:], "label 0 is 'cherry' .* and 'fig' in the"),
        ([*NAMES, "quince"], "label 4 is None"),
    ):
        with pytest.raises(DataError, match=told):
            wrap(Loader(NAMES), Loader(names))
    assert wrap(Loader(NAMES), Loader(NAMES)).classes == tuple(NAMES)
    assert wrap(Loader(NAMES), list(Loader(NAMES))).classes == tuple(NAMES)  # of which no names are known


@pytest.mark.parametrize("method", ["kd", "sokd"])
def test_a_teacher_of_the_same_classes_in_another_order_answers_in_that_of_the_data(
    method: str, run: okdc.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.metrics["top1"] > 90
    capsys.readouterr()
    reordered = ["fig", "plum", "lemon", "cherry"]
    result = train(reordered, tmp_path, method=method, teacher=str(run.path), epochs=1)
    said = capsys.readouterr().err
    assert "the same classes in another order (number 0 is 'cherry' in the teacher and 'fig' in the data)" in said
    assert f"top-1 {run.metrics['top1']:.2f}% of 64 validation images" in said
    if method == "sokd":  # the by-product speaks the data's order, under the teacher's own keys
        assert result.byproducts["bridge"].state_dict().keys() == run.student.state_dict().keys()


@pytest.mark.parametrize("place", ["", "model_best.pth.tar"])
def test_the_rows_of_the_classifier_move(run: okdc.Result, place: str) -> None:
    network, images = Tiny(), torch.randn(5, 3, 16, 16)
    network.load_state_dict(run.student.state_dict())
    expected = network.eval()(images)[:, [1, 3, 2, 0]]
    teachers.align(network, str(run.path / place), ["fig", "plum", "lemon", "cherry"], (3, 16, 16))
    torch.testing.assert_close(network(images), expected)


def test_a_teacher_of_some_other_classes_is_refused(run: okdc.Result) -> None:
    names = ["cherry", "fig", "lemon", "quince"]
    with pytest.raises(NetworkError, match=r"'plum' only in the teacher; 'quince' only in the data.*--method baseline"):
        teachers.align(Tiny(), str(run.path), names, (3, 16, 16))


def test_names_of_another_kind_are_said_and_numbers_are_none(
    run: okdc.Result, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Tiny()
    before = network.head.weight.detach().clone()
    teachers.align(network, str(run.path), ["n01", "n02", "n03", "n04"], (3, 16, 16))
    assert (
        "its classes have other names ('cherry', 'fig', 'lemon', 'plum' only in the teacher" in capsys.readouterr().err
    )
    teachers.align(network, str(run.path), ["0", "1", "2", "3"], (3, 16, 16))
    assert not capsys.readouterr().err and torch.equal(network.head.weight, before)


def test_the_names_of_a_bundle_and_of_a_hub_are_known_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"label_names": NAMES}))
    for name, network in ((f"local-dir:{tmp_path}", Tiny()), ("hf-hub:a/b", Tiny())):
        if name.startswith("hf"):
            network.pretrained_cfg = {"label_names": NAMES}
        before = network.head.bias.detach().clone()
        teachers.align(network, name, NAMES[::-1], (3, 16, 16))
        assert torch.equal(network.head.bias, before.flip(0))


def test_outputs_that_cannot_be_moved_are_refused(run: okdc.Result) -> None:
    class Twice(Tiny):
        """The mean of two heads, as distilled vision transformers have them: one alone must not move."""

        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.late(self.early(self.stem(x))).mean((2, 3))
            return self.head(x) / 2 + self.second(x) / 2

    with pytest.raises(NetworkError, match=r"cannot be put in the order of the data: .*--class-map FILE"):
        teachers.align(Twice(), str(run.path), NAMES[::-1], (3, 16, 16))


def start(run: okdc.Result, names: list[str]) -> nn.Module:
    """The target of a run that begins with the weights of `run`, on data whose classes are `names`."""
    loader = Loader(names)
    recipe = override(Recipe(), SETTINGS | {"checkpoint": str(run.path / "model_best.pth.tar"), "method": "baseline"})
    return assemble.network_and_data(recipe.network.model, loader, loader, recipe)[0]


@pytest.mark.parametrize(
    ("names", "rows", "told"),
    [
        (NAMES, [0, 1, 2, 3], ""),
        (["fig", "plum", "lemon", "cherry"], [1, 3, 2, 0], "in another order (number 0 is 'cherry' in the saved"),
        (["n01", "n02", "n03", "n04"], [0, 1, 2, 3], "its classes have other names"),
        (["cherry", "fig", "lemon", "quince"], None, "'plum' only in the saved network; 'quince' only in the data"),
    ],
    ids=["same", "order", "kind", "some"],
)
def test_a_run_that_begins_with_saved_weights_knows_their_classes_by_name(
    run: okdc.Result, names: list[str], rows: list[int] | None, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    network, learned = start(run, names), run.student.state_dict()
    state = network.state_dict()
    assert told in caplog.text and bool(told) == bool(caplog.records)
    assert all(module.training for module in network.modules())
    kept = [torch.equal(state[key], learned[key]) for key in state if not key.startswith("head.")]
    assert kept and all(kept)
    if rows is None:
        assert "it gets a new classifier" in caplog.text
        assert not any(torch.equal(row, old) for row in state["head.weight"] for old in learned["head.weight"])
    else:
        assert torch.equal(state["head.weight"], learned["head.weight"][rows])
        assert torch.equal(state["head.bias"], learned["head.bias"][rows])
