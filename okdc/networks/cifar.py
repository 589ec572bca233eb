"""The 32x32 networks that distillation papers report on, registered with timm and built from timm's own blocks.

`resnet32_cifar` and its like are created by name as any other timm network. Two names need a word of care: "ResNet-110"
is `resnet110_cifar` (basic blocks, 1.74 M) in ONE and FFL, but `resnet110_bottleneck_cifar` (1.17 M) in AHBF, OKDDip,
PCL, MCL-OKD and L-MCL; "WRN-20-8" in those tables is a bottleneck ResNet-20 of base width 512 (6.87 M), not one of
Zagoruyko's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, ConvNormAct, SelectAdaptivePool2d, calculate_drop_path_rates, create_conv2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from timm.models.resnetv2 import PreActBasic, ResNetStage
from torch import Tensor, nn

_PLANES = (16, 32, 64)
_VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class CifarNet(nn.Module):
    """Stem, stages, final norm, pooling, hidden layers, classifier: timm's interface, (B, in_chans, H, W) to logits."""

    def __init__(
        self,
        stem: nn.Module,
        stages: list[nn.Module],
        widths: list[int],
        *,
        norm: nn.Module | None = None,
        hidden: nn.Module | None = None,
        halve_first: bool = False,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = widths[-1]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm or nn.Identity()
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.hidden = hidden or nn.Identity()
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": width, "reduction": 2 ** (i + halve_first), "module": f"stages.{i}"}
            for i, width in enumerate(widths)
        ]
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He normal (fan out) for every convolution; hidden linear layers as VGG has them; the rest is torch's own."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.hidden.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers in their order, for timm's learning rates of layers: stem, blocks (`coarse`: stages), and the head."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)(?:\.blocks)?\.(\d+)"}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier of `num_classes` outputs in place; 0 leaves the embedding, (B, num_features)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        weight = next(self.parameters())
        fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.fc = fc.to(device=weight.device, dtype=weight.dtype).train(self.training)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.hidden(self.global_pool(x))
        x = nn.functional.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _resnet(
    layers: tuple[int, ...],
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
    base_width: int = 64,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    **kwargs: Any,
) -> CifarNet:
    """He et al. 2015, section 4.2, with a 1x1 projection where the width changes (option B)."""
    named, info = make_blocks(
        (block,) * len(layers),
        _PLANES,
        layers,
        inplanes=_PLANES[0],
        drop_path_rate=drop_path_rate,
        base_width=base_width,
        act_layer=nn.ReLU,
        norm_layer=nn.BatchNorm2d,
    )
    stem = ConvNormAct(in_chans, _PLANES[0], 3)
    return CifarNet(stem, [stage for _, stage in named], [i["num_chs"] for i in info], in_chans=in_chans, **kwargs)


def _wide_resnet(depth: int, width: int, in_chans: int = 3, drop_path_rate: float = 0.0, **kwargs: Any) -> CifarNet:
    """Zagoruyko and Komodakis 2016: (depth - 4) / 6 pre-activation blocks per stage, `width` times wider."""
    blocks, widths = (depth - 4) // 6, [width * planes for planes in _PLANES]
    rates = calculate_drop_path_rates(drop_path_rate, [blocks] * 3, stagewise=True)  # one list per stage
    stages: list[nn.Module] = [
        ResNetStage(
            before,
            after,
            stride=1 if i == 0 else 2,
            dilation=1,
            depth=blocks,
            bottle_ratio=1.0,
            block_dpr=rates[i],  # type: ignore[arg-type]
            block_fn=PreActBasic,
            conv_layer=create_conv2d,
            norm_layer=BatchNormAct2d,
        )
        for i, (before, after) in enumerate(zip([_PLANES[0], *widths], widths))
    ]
    stem = create_conv2d(in_chans, _PLANES[0], 3)
    return CifarNet(stem, stages, widths, norm=BatchNormAct2d(widths[-1]), in_chans=in_chans, **kwargs)


def _vgg(in_chans: int = 3, drop_rate: float = 0.0, **kwargs: Any) -> CifarNet:
    """VGG-16 with batch norm and two hidden layers of 512; each stage ends in a 2x2 max-pool, so 32x32 becomes 1x1."""
    stages: list[nn.Module] = []
    before = in_chans
    for width, count in _VGG16:
        units = [ConvNormAct(before if i == 0 else width, width, 3, bias=True) for i in range(count)]
        stages.append(nn.Sequential(*units, nn.MaxPool2d(2)))
        before = width
    hidden = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Dropout(drop_rate), nn.Linear(512, 512), nn.ReLU())
    widths = [width for width, _ in _VGG16]
    return CifarNet(
        nn.Identity(), stages, widths, hidden=hidden, halve_first=True, in_chans=in_chans, drop_rate=drop_rate, **kwargs
    )


# CIFAR-100's channel means and standard deviations; padding and cropping are the recipe's business, hence crop_pct 1.
_CFG = {
    "num_classes": 100,
    "input_size": (3, 32, 32),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.5071, 0.4865, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
    "classifier": "fc",
}
_NETWORKS: dict[str, tuple[Callable[..., CifarNet], str]] = {
    "resnet20_cifar": (partial(_resnet, (3, 3, 3)), "stem.conv"),
    "resnet32_cifar": (partial(_resnet, (5, 5, 5)), "stem.conv"),
    "resnet56_cifar": (partial(_resnet, (9, 9, 9)), "stem.conv"),
    "resnet110_cifar": (partial(_resnet, (18, 18, 18)), "stem.conv"),
    "resnet110_bottleneck_cifar": (partial(_resnet, (12, 12, 12), Bottleneck), "stem.conv"),
    "wrn_16_1_cifar": (partial(_wide_resnet, 16, 1), "stem"),
    "wrn_16_2_cifar": (partial(_wide_resnet, 16, 2), "stem"),
    "wrn_40_1_cifar": (partial(_wide_resnet, 40, 1), "stem"),
    "wrn_40_2_cifar": (partial(_wide_resnet, 40, 2), "stem"),
    "wrn_28_10_cifar": (partial(_wide_resnet, 28, 10), "stem"),
    "wrn_20_8_cifar": (partial(_resnet, (2, 2, 2), Bottleneck, 512), "stem.conv"),
    "vgg16_cifar": (_vgg, "stages.0.0.conv"),
}
default_cfgs = generate_default_cfgs({name: {**_CFG, "first_conv": first} for name, (_, first) in _NETWORKS.items()})


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> CifarNet:
        build, _ = _NETWORKS[name]
        stages = len(_VGG16 if build is _vgg else _PLANES)
        features = {"flatten_sequential": True, "out_indices": tuple(range(stages))}
        return build_model_with_cfg(build, name, pretrained, feature_cfg=features, **kwargs)

    # timm registers an entry point under its __name__, with the default_cfgs of the module that it says it is from.
    entrypoint.__name__ = entrypoint.__qualname__ = name
    register_model(entrypoint)


for _name in _NETWORKS:
    _register(_name)
