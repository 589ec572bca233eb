"""Networks by name: what is built, with how many classes, from which weights, and what is said when it cannot be."""

from __future__ import annotations

import http.server
import sys
import threading
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

from okdc import networks
from okdc.errors import NetworkError
from okdc.networks import cifar, download, from_torchvision
from okdc.pipeline import assemble
from okdc.recipe import LOADER, NetworkSettings, resolve

# Parameters with 100 classes, and where that number is stated. "golden" are exact counts of the authors' own code.
CIFAR_PARAMETERS = {
    "resnet20_cifar": (278_324, "He 2015, table 6: 0.27 M with 10 classes; 278,324 - 5,850 = 0.272 M"),
    "resnet32_cifar": (472_756, "golden ahbf_structure, deployed; 0.47 M in MCL-OKD"),
    "resnet56_cifar": (861_620, "He 2015, table 6: 0.85 M with 10 classes"),
    "resnet110_cifar": (1_736_564, "1.73 M in ONE and 1.737 M in FFL; He 2015: 1.7 M"),
    "resnet110_bottleneck_cifar": (1_170_868, "golden ahbf_structure, deployed; 1.17 M in MCL-OKD and L-MCL"),
    "wrn_16_1_cifar": (180_916, "0.2 M in Zagoruyko 2017 (attention transfer), 10 classes"),
    "wrn_16_2_cifar": (703_284, "0.7 M in Zagoruyko 2017 (attention transfer), 10 classes"),
    "wrn_40_1_cifar": (569_780, "Zagoruyko 2016, table 4: 0.6 M"),
    "wrn_40_2_cifar": (2_255_156, "SOKD and L-MCL: 2.26 M; Zagoruyko 2016, table 4: 2.2 M"),
    "wrn_28_10_cifar": (36_536_884, "Zagoruyko 2016, table 4: 36.5 M"),
    "wrn_20_8_cifar": (6_871_220, "PCL: 6.87 M"),
    "vgg16_cifar": (15_299_748, "golden ahbf_structure, deployed; 15.3 M in PCL"),
}
# One of each family; the other sizes are built alike (pytest -m zoo builds all of them).
TORCHVISION_FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
]


def load(model: str, classes: int | None = None, **settings: object) -> nn.Module:
    return networks.load(NetworkSettings(model=model, **settings), classes)  # type: ignore[arg-type]


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def grey(classes: int = 10, width: int = 4) -> nn.Module:
    """A network of the user's own, found as tests.networks.test_networks:grey."""
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def coloured(num_classes: int) -> nn.Module:
    return grey(num_classes)


# --- the CIFAR networks ---------------------------------------------------------------------------------------------


def test_cifar_networks_have_the_parameters_that_the_papers_state() -> None:
    assert set(CIFAR_PARAMETERS) == set(cifar.default_cfgs)
    with torch.device("meta"):
        assert {name: parameters(timm.create_model(name)) for name in CIFAR_PARAMETERS} == {
            name: count for name, (count, _) in CIFAR_PARAMETERS.items()
        }


@pytest.mark.parametrize(
    "name, key",
    [("resnet32_cifar", "cifar_resnet32_M4_a4_K100"), ("resnet110_bottleneck_cifar", "cifar_resnet110_M4_a4_K100"),
     ("vgg16_cifar", "cifar_vgg16_M4_a4_K100")],
)  # fmt: skip
def test_cifar_networks_are_those_of_the_golden_vectors(name: str, key: str) -> None:
    golden = Path(__file__).parents[1] / "golden" / "ahbf_structure.safetensors"
    with safe_open(golden, "pt") as file:
        *_, deployed = file.get_tensor(f"{key}.totals").tolist()
    assert parameters(timm.create_model(name)) == deployed


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet110_bottleneck_cifar", "wrn_16_1_cifar", "vgg16_cifar"])
def test_cifar_networks_behave_like_timms(name: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    network = timm.create_model(name).eval()
    features = network.forward_features(images)
    assert torch.equal(network.forward_head(features), network(images))
    assert network.forward_head(features, pre_logits=True).shape == (2, network.num_features)
    assert network.get_classifier() is network.get_submodule(network.pretrained_cfg["classifier"])
    assert network.get_submodule(network.pretrained_cfg["first_conv"]).in_channels == 3
    assert network(images).shape == (2, 100) and network.num_classes == 100
    assert network.pretrained_cfg["input_size"] == (3, 32, 32)

    network.reset_classifier(7)
    assert network(images).shape == (2, 7) and network.num_classes == 7 and not network.fc.training
    network.reset_classifier(0)
    assert network(images).shape == (2, network.num_features)

    taps = timm.create_model(name, features_only=True)
    assert [tuple(t.shape[1:3:1]) for t in taps(images)] == [
        (info["num_chs"], 32 // info["reduction"]) for info in network.feature_info
    ]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"model": "torchvision/vit_b_16"}, {}),
        ({"model": "torchvision/vit_b_16", "img_size": 64}, {"image_size": 64}),
        ({"model": "torchvision/vit_h_14", "pretrained": True}, {"image_size": 518}),  # that of its weights
        ({"model": "torchvision/maxvit_t", "img_size": 448}, {"input_size": (448, 448)}),
        ({"model": "torchvision/resnet18", "model_kwargs": {"groups": 1}}, {"groups": 1}),
        ({"model": "resnet18", "img_size": 64, "model_kwargs": {"stem_width": 8}}, {"stem_width": 8}),
    ],
)
def test_what_makes_a_network_again_is_noted(settings: dict, expected: dict) -> None:
    assert networks.arguments(NetworkSettings(**settings)) == expected


def test_cifar_networks_take_grey_images_dropout_and_stochastic_depth() -> None:
    assert load("vgg16_cifar", 5, in_chans=1, drop=0.5)(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    network = load("wrn_16_1_cifar", 5, drop=0.3, drop_path=0.9).train()
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(network(images), network(images))
    assert torch.equal(network.eval()(images), network(images))


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCHVISION_FAMILIES)
def test_torchvision_classifiers_get_the_datas_classes(name: str) -> None:
    check_torchvision(name)


@pytest.mark.zoo
@pytest.mark.parametrize("name", from_torchvision.names())
def test_every_torchvision_classifier_gets_the_datas_classes(name: str) -> None:
    check_torchvision(name)


def check_torchvision(name: str) -> None:
    # RegNet's builder computes its widths with tensors, which the meta device cannot do.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        network = load(f"torchvision/{name}", 7).train()
        side = 299 if name == "inception_v3" else 224
        output = network(torch.empty(2, 3, side, side))
    assert isinstance(output, Tensor) and output.shape == (2, 7)


def test_the_torchvision_families_are_all_there() -> None:
    stems = {name.rstrip("0123456789").split("_")[0].rstrip("0123456789") for name in TORCHVISION_FAMILIES}
    others = {name for name in from_torchvision.names() if not name.startswith(tuple(stems))}
    assert others == {"resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"}
    assert len(from_torchvision.names()) >= 80


def test_timm_networks_take_size_channels_rates_and_arguments() -> None:
    with torch.device("meta"):
        network = load("vit_tiny_patch16_224", 5, img_size=64, in_chans=1, drop_path=0.1, model_kwargs={"depth": 2})
        assert network(torch.empty(1, 1, 64, 64)).shape == (1, 5)
        assert len(network.blocks) == 2
        assert load("resnet18", 5, img_size=64).num_classes == 5
        assert load("resnet18").num_classes == 1000
        assert load("resnet18", 5, num_classes=8).num_classes == 8


def test_a_function_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = __name__
    assert load(f"{here}:coloured", 6)(torch.randn(1, 3, 8, 8)).shape == (1, 6)
    assert (
        load(f"{here}:grey", 6, model_kwargs={"width": 5})[0].out_channels == 5
    )  # it takes no num_classes: left alone
    (tmp_path / "okdc_test_own.py").write_text(
        "from torch import nn\ndef tiny(**kwargs):\n    return nn.Linear(2, kwargs['num_classes'])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert load("okdc_test_own:tiny", 3).out_features == 3


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": "resnet8"}, "Did you mean resnet"),
        ({"model": "torchvision/resnet19"}, "Did you mean torchvision/resnet18"),
        ({"model": "timm/resnet18.a1_in1k"}, "hf-hub:timm/resnet18.a1_in1k"),
        ({"model": "local-dir:nowhere"}, "config.json"),
        ({"model": "resnet18.no_such_tag"}, "no_such_tag"),
        ({"model": "no_such_module:build"}, "no Python module no_such_module"),
        ({"model": "tests.networks.test_networks:gray"}, "Did you mean grey"),
        ({"model": "tests.networks.test_networks:parameters"}, "missing a required argument: 'network'"),
        ({"model": "collections:Counter"}, "not a torch.nn.Module"),
        ({"model": "vgg11", "drop_path": 0.1}, "Leave out network.drop_path"),
        ({"model": "resnet18", "model_kwargs": {"dpeth": 3}}, "network.model_kwargs: dpeth"),
        ({"model": "resnet18", "model_kwargs": {"num_classes": 0}}, "--num-classes, not --model-kwargs"),
        ({"model": "vit_tiny_patch16_224", "model_kwargs": {"img_size": 32}}, "--img-size, not --model-kwargs"),
        ({"model": "torchvision/resnet18", "drop": 0.1}, "--model-kwargs"),
        ({"model": "torchvision/resnet18", "model_kwargs": {"foo": 3}}, "foo"),
        ({"model": "resnet32_cifar", "pretrained": True}, "no pre-trained weights"),
        ({"model": "resnet18", "num_classes": 4}, "the data has 5 classes"),
    ],
)
def test_what_cannot_be_built_is_said(settings: dict, words: str) -> None:
    with pytest.raises(NetworkError) as error:
        networks.load(NetworkSettings(**settings), 5)
    assert words in str(error.value)


def test_a_download_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match=r"^resnet18 could not be downloaded .*--checkpoint"):
        load("resnet18", pretrained=True, model_kwargs={"cache_dir": str(tmp_path)})


def test_a_hub_that_does_not_answer_is_not_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its client asks for each of several files six times, in most of a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it was tried again"))
    with pytest.raises(
        NetworkError, match=r"^resnet18 could not be downloaded \(http://127.0.0.1:9 does not answer\): "
    ):
        load("resnet18", pretrained=True, model_kwargs={"cache_dir": str(tmp_path)})
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_weights_that_a_checkpoint_replaces_are_not_fetched(tmp_path: Path) -> None:
    """A network without pre-trained weights shows it: to fetch them would be refused."""
    torch.save(load("resnet20_cifar", 10).state_dict(), tmp_path / "ten.pth")
    assert load("resnet20_cifar", 10, pretrained=True, checkpoint=str(tmp_path / "ten.pth"))
    with pytest.raises(NetworkError, match="has no pre-trained weights"):
        load("resnet20_cifar", 10, pretrained=True)


def test_a_hub_that_refuses_answers() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as hub:  # 501 to all
        thread = threading.Thread(target=hub.handle_request)
        thread.start()
        assert download._answers(f"http://127.0.0.1:{hub.server_port}")
        thread.join()


# --- images ---------------------------------------------------------------------------------------------------------


def test_data_config_is_the_networks_own_unless_told_otherwise() -> None:
    settings = NetworkSettings(model="resnet20_cifar")
    network = networks.load(settings)
    config = networks.data_config(network, settings)
    assert config == {
        "input_size": (3, 32, 32),
        "mean": (0.5071, 0.4865, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    told = networks.data_config(
        network, settings, image_size=(8, 6), mean=[0.5], std=[0.1, 0.2, 0.3], interpolation="bicubic", crop_pct=0.9
    )
    assert told["input_size"] == (3, 8, 6) and told["mean"] == (0.5,) * 3 and told["std"] == (0.1, 0.2, 0.3)
    assert told["interpolation"] == "bicubic" and told["crop_pct"] == 0.9
    sized = networks.data_config(network, replace(settings, img_size=48), image_size=(8, 6))
    assert sized["input_size"] == (3, 48, 48)
    grey_config = networks.data_config(network, replace(settings, in_chans=1))
    assert grey_config["input_size"] == (1, 32, 32) and len(grey_config["mean"]) == len(grey_config["std"]) == 1
    with pytest.raises(NetworkError, match=r"data.mean has 2 values"):
        networks.data_config(network, settings, mean=[0.1, 0.2])


def test_data_config_of_torchvision_and_of_strangers() -> None:
    inception = networks.data_config(nn.Identity(), NetworkSettings(model="torchvision/inception_v3"))
    assert inception["input_size"] == (3, 299, 299) and inception["interpolation"] == "bilinear"
    assert inception["crop_pct"] == pytest.approx(299 / 342)
    own = networks.data_config(nn.Identity(), NetworkSettings(model="package.module:function"))
    assert own["input_size"] == (3, 224, 224) and own["mean"] == timm.data.IMAGENET_DEFAULT_MEAN


def test_images_that_are_too_small_are_refused_with_a_size_that_works() -> None:
    network = load("torchvision/alexnet", 5).train()
    network.features.eval()
    assert networks.check_input(network, (3, 64, 64)).shape == (1, 5)
    with pytest.raises(NetworkError, match=r"cannot take images of 3x16x16.*smaller than .*--img-size 64 works"):
        networks.check_input(network, (3, 16, 16))
    assert network.training and not network.features.training  # left as it was


def test_images_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(NetworkError, match="--in-chans"):
        networks.check_input(load("resnet20_cifar"), (1, 32, 32))
    vit = load("vit_tiny_patch16_224", 5, img_size=32, model_kwargs={"depth": 1})
    with pytest.raises(NetworkError, match="built for another size: --img-size 32"):
        networks.check_input(vit, (3, 224, 224))


@pytest.mark.parametrize("loader", [None, [(torch.randn(4, 1, 32, 32), torch.arange(4))]])
def test_a_run_checks_its_input_once(loader: list | None) -> None:
    network = load("resnet20_cifar", 10 if loader is None else 4, in_chans=1)
    passes: list[Tensor] = []
    network.register_forward_hook(lambda module, args, output: passes.append(output))
    source = {} if loader is None else {"data": LOADER}
    assemble.network_and_data(network, loader, None, resolve(flat={"model": "ResNet", "in_chans": 1, **source}))
    assert [logits.shape for logits in passes] == [(1, network.num_classes)]
