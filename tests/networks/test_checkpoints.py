"""Weights of one's own: a checkpoint in every form, a bundle and a run folder, each put into a network or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from okdc import networks
from okdc.anatomy import inspect
from okdc.errors import NetworkError
from okdc.networks import weights
from okdc.pipeline import teachers
from okdc.recipe import NetworkSettings, Recipe
from tests.helpers.networks import Gated
from tests.networks.test_networks import coloured, load


def same(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    return torch.equal(one.eval()(images), other.eval()(images))


@pytest.mark.parametrize("wrapped", ["plain", "timm", "ddp", "safetensors"])
def test_a_checkpoint_is_loaded_in_every_form(tmp_path: Path, wrapped: str) -> None:
    source, file, images = load("resnet20_cifar", 10), tmp_path / "weights.pth", torch.randn(2, 3, 32, 32)
    state = source.state_dict()
    if wrapped == "safetensors":
        from safetensors.torch import save_file

        file = tmp_path / "weights.safetensors"
        save_file(state, file)
    else:
        forms = {
            "plain": state,
            "timm": {"state_dict": state, "arch": "resnet20_cifar", "epoch": 3},
            "ddp": {f"module.{key}": value for key, value in state.items()},
        }
        torch.save(forms[wrapped], file)
    assert same(source, load("resnet20_cifar", 10, checkpoint=str(file)), images)


@pytest.mark.parametrize("model", ["resnet20_cifar", "torchvision/squeezenet1_1"])
def test_a_checkpoint_of_other_classes_keeps_all_but_the_classifier(tmp_path: Path, model: str) -> None:
    source = load(model, 10)
    torch.save(source.state_dict(), tmp_path / "ten.pth")
    network = load(model, 4, checkpoint=str(tmp_path / "ten.pth"))
    (name,) = weights.classifier_names(network)
    assert weights.num_classes(network) == 4
    others = {key: value for key, value in source.state_dict().items() if not key.startswith(f"{name}.")}
    assert len(others) > 10
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in others.items())
    assert weights.num_classes(load(model, checkpoint=str(tmp_path / "ten.pth"))) == 10


WRAPPED: dict[str, tuple[Callable[[dict], dict], str]] = {
    "Lightning": (lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "epoch": 3}, "'model.' before"),
    "backbone": (lambda s: {f"backbone.{k}": v for k, v in s.items()}, "'backbone.' before"),
    "net": (lambda s: {"net": s, "acc": 91.0, "epoch": 3, "optimizer": {"state": {0: {}}}}, "'net' around them"),
    "of two": (lambda s: {"net": s, "loss": {"w": torch.ones(1)}, "sums": {0: torch.ones(1)}}, "'net' around them"),
    "both": (lambda s: {"net": {f"a.b.{k}": v for k, v in s.items()}}, "'net' around them and the 'a.b.' before"),
}


@pytest.mark.parametrize(("wrap", "said"), WRAPPED.values(), ids=WRAPPED)
def test_what_a_wrapper_put_around_the_weights_is_left_out_and_said(
    tmp_path: Path, wrap: Callable[[dict], dict], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, images, file = load("resnet20_cifar", 10).eval(), torch.randn(2, 3, 32, 32), tmp_path / "wrapped.ckpt"
    torch.save(wrap(source.state_dict()), file)
    assert same(source, load("resnet20_cifar", 10, checkpoint=str(file)), images)
    assert said in caplog.text and "wrapped.ckpt" in caplog.text
    assert weights.num_classes(load("resnet20_cifar", 4, checkpoint=str(file))) == 4, "another head is put in its place"
    torch.save(wrap(source.state_dict()) | {"arch": "resnet20_cifar"}, file)
    if "state_dict" in wrap({}):  # a teacher's checkpoint has one, and its network's name beside it
        assert same(source, teachers.load(str(file), (3, 32, 32), 10), images)


def test_what_stands_beside_wrapped_weights_is_still_refused(tmp_path: Path) -> None:
    state, file = load("resnet20_cifar", 10).state_dict(), tmp_path / "wrapped.pth"
    wrapped = {f"model.{key}": value for key, value in state.items()}
    for given, words in (
        (wrapped | {"loss.weight": torch.ones(10)}, "loss.weight is unknown|stem.conv.weight is missing"),
        ({k: v for k, v in wrapped.items() if "stem" not in k}, "stem.conv.weight is missing"),
        ({"net": state, "ema": state}, "no one state_dict of this network .*, but net and ema, each .* torch.save"),
        ({"net": wrapped | {"loss.weight": torch.ones(10)}}, r"no one state_dict of this network \(\w+\)\. Save"),
    ):
        torch.save(given, file)
        with pytest.raises(NetworkError, match=words):
            load("resnet20_cifar", checkpoint=str(file))


def test_the_classifier_is_what_is_called_last_not_what_is_registered_last(tmp_path: Path) -> None:
    source = load("tests.helpers.networks:Gated", 10)
    torch.save(source.state_dict(), tmp_path / "ten.pth")
    network = load("tests.helpers.networks:Gated", 4, checkpoint=str(tmp_path / "ten.pth"), img_size=32)
    assert inspect(network, (3, 32, 32)).classifier == "head" == weights.classifier_names(network, (3, 32, 32))[0]
    assert weights.classifier_names(network) == ["gate"], "without a run there is but the order of its modules"
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in source.state_dict().items() if "head" not in k)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_what_a_network_states_wins_over_every_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gated, "get_classifier", lambda self: self.gate, raising=False)
    assert inspect(Gated(), (3, 32, 32)).classifier == "gate" == weights.classifier_names(Gated(), (3, 32, 32))[0]
    monkeypatch.setattr(Gated, "get_classifier", lambda self: nn.Identity())
    assert weights.classifier_names(Gated()) == [] and weights.num_classes(Gated()) is None
    with torch.device("meta"):
        volo = timm.create_model("volo_d1_224", num_classes=3)  # get_classifier() says one, pretrained_cfg says both
    assert weights.classifier_names(volo) == ["head", "aux_head"]


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.pth.tar"
    torch.save({"state_dict": load("wrn_16_1_cifar").state_dict(), "arch": "wrn_16_1_cifar"}, file)
    with pytest.raises(NetworkError) as error:
        load("resnet20_cifar", checkpoint=str(file))
    for words in ("stem.conv.weight is missing", "more", "(wrn_16_1_cifar)", "--model"):
        assert words in str(error.value)
    torch.save(load("resnet32_cifar", in_chans=1).state_dict(), file)
    with pytest.raises(NetworkError, match=r"stem.conv.weight is \(16, 1, 3, 3\), expected \(16, 3, 3, 3\)"):
        load("resnet32_cifar", checkpoint=str(file))


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    for name in ("evil.pth", "broken.pth", "missing.pth"):
        with pytest.raises(NetworkError, match=name):
            load("resnet20_cifar", checkpoint=str(tmp_path / name))
    assert not marker.exists()


def test_a_bundle_is_a_network(tmp_path: Path) -> None:
    source, images = load("resnet20_cifar", 10), torch.randn(2, 3, 32, 32)
    save_for_hf(source, str(tmp_path), model_args=source._model_args, safe_serialization=True)
    assert same(source, load(str(tmp_path)), images)
    assert same(source, timm.create_model(f"local-dir:{tmp_path}", pretrained=True), images)
    assert load(str(tmp_path), 3)(images).shape == (2, 3)


def test_a_bundle_of_torchvisions(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, images = load("torchvision/squeezenet1_1", 10), torch.randn(1, 3, 64, 64)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architecture": "torchvision/squeezenet1_1", "num_classes": 10}))
    assert same(source, load(str(tmp_path)), images)
    config.write_text(json.dumps({"architecture": "tests.networks.test_networks:coloured"}))
    with pytest.raises(NetworkError, match="not run unasked"):
        load(str(tmp_path))


def test_a_run_folder_is_a_network(tmp_path: Path) -> None:
    recipe = Recipe(network=NetworkSettings(model="resnet20_cifar", pretrained=True, in_chans=1))
    source, images = load("resnet20_cifar", 10, in_chans=1), torch.randn(2, 1, 32, 32)
    with pytest.raises(NetworkError, match="neither a bundle"):
        load(str(tmp_path))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    torch.save({"state_dict": source.state_dict(), "arch": "resnet20_cifar"}, tmp_path / "model_best.pth.tar")
    assert same(source, load(str(tmp_path)), images)
    assert load(str(tmp_path), 3)(images).shape == (2, 3)
    own = Recipe(network=replace(recipe.network, model="tests.networks.test_networks:coloured"))
    (tmp_path / "recipe.yaml").write_text(own.to_yaml())
    torch.save({"state_dict": coloured(10).state_dict()}, tmp_path / "model_best.pth.tar")
    with pytest.raises(NetworkError, match=r"--model tests.networks.test_networks:coloured"):
        load(str(tmp_path))
    network = networks.load(NetworkSettings(model=str(tmp_path)), 10, typed=["tests.networks.test_networks:coloured"])
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 10)
