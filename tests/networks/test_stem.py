"""Networks made for ImageNet take small images, and other channels, and what was changed goes with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import okdc
from okdc import deploy, networks
from okdc.deploy import bundle
from okdc.errors import NetworkError
from okdc.networks import stem
from okdc.recipe import ExportSettings, NetworkSettings
from tests.helpers import networks as own

STEMS = {
    "resnet10t": ["conv1.0", "maxpool"],
    "mobilenetv2_035": ["conv_stem", "blocks.1.0.conv_dw"],
    "regnetx_002": ["stem.conv", "s1.b1.conv2.conv", "s1.b1.downsample.conv"],
    "torchvision/squeezenet1_1": ["features.0", "features.2"],
    "torchvision/shufflenet_v2_x0_5": ["conv1.0", "maxpool"],
    "resnet20_cifar": [],
}


def small(model: str, **settings: object) -> nn.Module:
    return networks.load(NetworkSettings(model=model, small_input=True, img_size=32, **settings), 4)  # type: ignore[arg-type]


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", STEMS)
def test_the_first_layers_keep_the_size_of_small_images(name: str) -> None:
    network = small(name)
    assert sorted(stem.changes(network)) == sorted(STEMS[name])
    sides = [c.output[-1] for c in okdc.inspect(network, images()).calls if len(c.output or ()) == 3]
    assert sides[0] >= 30


def test_a_resnet_becomes_what_it_is_for_cifar() -> None:
    network = small("torchvision/resnet18")
    assert isinstance(network.maxpool, nn.Identity)
    conv = network.conv1
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    assert conv.weight.shape == (64, 3, 3, 3) and conv.weight.requires_grad


def test_trained_filters_keep_their_middle_and_their_strength() -> None:
    network = timm.create_model("resnet10t", num_classes=4)
    network.conv1[0] = nn.Conv2d(3, 24, 7, 2, 3, bias=False)
    before = network.conv1[0].weight.detach().clone()
    stem.make_small(network, (3, 32, 32))
    after = network.conv1[0].weight.detach()
    torch.testing.assert_close(after.flatten(1).norm(dim=1), before.flatten(1).norm(dim=1))
    ratio = after / before[:, :, 2:5, 2:5]
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))


def test_weights_from_before_and_after_the_change(tmp_path: Path) -> None:
    whole, changed = networks.load(NetworkSettings(model="torchvision/resnet18"), 4), small("torchvision/resnet18")
    for network, name in ((whole, "whole.pth"), (changed, "changed.pth")):
        torch.save(network.state_dict(), tmp_path / name)
    again = small("torchvision/resnet18", checkpoint=str(tmp_path / "changed.pth"))
    assert torch.equal(again.eval()(images()), changed.eval()(images()))
    middle = small("torchvision/resnet18", checkpoint=str(tmp_path / "whole.pth"))
    assert torch.equal(middle.layer1[0].conv1.weight, whole.layer1[0].conv1.weight)
    torch.testing.assert_close(
        nn.functional.cosine_similarity(middle.conv1.weight.flatten(1), whole.conv1.weight[:, :, 2:5, 2:5].flatten(1)),
        torch.ones(64),
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("vit_tiny_patch16_224", r"patches of 16 pixels.*--model-kwargs patch_size=4 --img-size 32"),
        ("convnext_atto", r"patches of 4 pixels.*--model-kwargs patch_size=1"),
        ("levit_128s", r"does not run with stem.conv1.linear is 3x3.*--img-size"),
        ("tresnet_m", "a SpaceToDepth, makes its images smaller"),
    ],
)
def test_stems_that_cannot_be_changed(name: str, words: str) -> None:
    with pytest.raises(NetworkError, match=words):
        small(name)


def test_what_small_input_needs() -> None:
    with pytest.raises(NetworkError, match="--img-size 32"):
        networks.load(NetworkSettings(model="resnet18", small_input=True))
    with pytest.raises(NetworkError, match="the Tiny that you pass is trained as it is"):
        okdc.compress(own.Tiny(), [(images(), torch.tensor([0, 1]))], small_input=True, img_size=32)


@pytest.mark.parametrize(
    "name, channels, small_input",
    [("mobilenetv2_035", 1, True), ("repvgg_a0", 3, True), ("torchvision/squeezenet1_1", 1, False)],
)
def test_a_bundle_knows_what_was_changed(tmp_path: Path, name: str, channels: int, small_input: bool) -> None:
    torch.manual_seed(0)  # one new SqueezeNet in thirty gives zeros for every image, which nothing can be compared with
    settings = NetworkSettings(model=name, small_input=small_input, img_size=32, in_chans=channels)
    student = networks.load(settings, 4).eval()
    deploy.export_bundle(
        student, None, ExportSettings(batch_sizes=[]), tmp_path / "export", arch=name,
        preprocess=networks.data_config(student, settings), classes="abcd",
    )  # fmt: skip
    folder, expected = tmp_path / "export", student(images(channels))
    config = json.loads((folder / "config.json").read_text())
    assert config["okdc"]["base"] == name and config["okdc"]["changes"] == stem.changes(student)
    with pytest.raises(RuntimeError, match="Unknown model"):  # rather than a network of other strides
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    rebuilt = bundle.load_student(folder)
    assert rebuilt is not None and torch.equal(rebuilt(images(channels)), expected)
    card = (folder / "README.md").read_text()
    assert "Its first layers are not the architecture's" in card and "library_name: timm" not in card
    code = card.partition("```python\n")[2].partition("```")[0].replace("PATH/OF/THIS/FOLDER", str(folder))
    scope: dict = {}
    exec(code, scope)
    assert torch.equal(scope["network"](images(channels)), expected)
    assert deploy.verify_bundle(folder, None, ExportSettings(batch_sizes=[]))["verdict"] == "parity_only"


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_torchvision_networks_take_any_number_of_channels(channels: int) -> None:
    torch.manual_seed(0)
    colours = networks.load(NetworkSettings(model="torchvision/squeezenet1_1"), 4)
    network = networks.load(NetworkSettings(model="torchvision/squeezenet1_1", in_chans=channels), 4)
    assert network(images(channels)).shape == (2, 4)
    state = {**colours.state_dict(), "features.0.weight": network.features[0].weight}
    network.load_state_dict(state)
    if channels == 1:  # as timm adapts: grey given as three equal colours says the same
        with torch.no_grad():
            network.features[0].weight.copy_(colours.features[0].weight.sum(1, keepdim=True))
        grey = images(1)
        torch.testing.assert_close(network.eval()(grey), colours.eval()(grey.expand(-1, 3, -1, -1)))
