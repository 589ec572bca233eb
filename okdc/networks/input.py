"""The images that a network takes: their size and preprocessing, and whether it really takes them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import timm
import torch
from torch import Tensor, nn

from okdc import tasks
from okdc.anatomy.modes import keep_modes
from okdc.errors import NetworkError, first_line
from okdc.networks import from_torchvision
from okdc.recipe import NetworkSettings
from okdc.tasks.shared.outputs import described
from okdc.tasks.task import Task


def data_config(
    network: nn.Module,
    settings: NetworkSettings,
    *,
    image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
) -> dict[str, Any]:
    """How images become the network's input: input_size (C, H, W), mean, std, interpolation, crop_pct and crop_mode.

    The settings' img_size wins, then `image_size` (H, W), then the network's own; a network that states none gets
    ImageNet's values. The other keywords override. Raises NetworkError for means that do not fit the channels.
    """
    own = _own_config(network, settings)
    channels = settings.in_chans
    _, *own_size = own.get("input_size") or (channels, 224, 224)
    if settings.model.startswith(from_torchvision.PREFIX) and isinstance(getattr(network, "image_size", None), int):
        own_size = [network.image_size] * 2  # type: ignore[list-item]  # not that of weights that were not asked for
    side = settings.img_size
    height, width = (side, side) if side else image_size or own_size
    given = {"mean": mean, "std": std, "interpolation": interpolation, "crop_pct": crop_pct}
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, channels):
            raise NetworkError(f"data.{name} has {len(values)} values, but the network takes {channels} channels.")
    config = timm.data.resolve_data_config({"input_size": (channels, height, width), **given}, pretrained_cfg=own)
    for name in ("mean", "std"):
        if len(config[name]) != channels:  # a network for colours given grey or multispectral images
            config[name] = (sum(config[name]) / len(config[name]),) * channels
    return config


def states_preprocessing(network: nn.Module, settings: NetworkSettings) -> bool:
    """Whether a network says how images become its input, as timm's and torchvision's do."""
    return "mean" in _own_config(network, settings)


def _own_config(network: nn.Module, settings: NetworkSettings) -> dict[str, Any]:
    return from_torchvision.data_config(settings.model) or getattr(network, "pretrained_cfg", None) or {}


def check_input(network: nn.Module, input_size: tuple[int, int, int], task: Task | None = None) -> Tensor:
    """The logits, (1, classes), or what else its task gives, of one black image of `input_size` (C, H, W).

    Raises NetworkError if there are none.
    """
    channels, height, width = input_size
    task = task or tasks.get()
    _refuse_meta(network)
    logits = task.result(_try_input(network, input_size))
    if isinstance(logits, Tensor) and task.is_output(logits) and len(logits) == 1:
        return logits
    if not isinstance(logits, Exception):
        one = isinstance(logits, Tensor)
        advice = "Does its forward drop the batch? .flatten(1) in place of .squeeze(), logits in place of logits[0]."
        raise NetworkError(
            f"{name_of(network)} returns {described(logits)}{' for a batch of one image' * one}, expected "
            f"{task.output}. {advice if one else task.advice(logits)}"
        )
    sizes = [side for side in (16, 32, 64, 96, 128, 224, 256, 299, 384) if side != height or side != width]
    takes = next((side for side in sizes if isinstance(_try_input(network, (channels, side, side)), Tensor)), None)
    if takes is None:
        advice = "Is --in-chans right?"
    elif takes > min(height, width):
        advice = f"Images smaller than the network takes: --img-size {takes} works (smaller images are enlarged)."
    else:
        advice = f"The network was built for another size: --img-size {takes} works."
    raise NetworkError(
        f"{name_of(network)} cannot take images of {channels}x{height}x{width}: {first_line(logits)}. {advice}"
    )


class Counting(nn.Module):
    """A network that gives several outputs, as one that gives the one that counts."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__()
        self.network, self.result = network, task.result

    def forward(self, images: Tensor) -> Tensor:
        return self.result(self.network(images))


def single(network: nn.Module, input_size: tuple[int, int, int], task: Task) -> nn.Module:
    """The network itself if it gives one output; around one that gives several, such as a list of maps, `Counting`."""
    given = _try_input(network, input_size)
    return network if task.result(given) is given else Counting(network, task)


def _refuse_meta(network: nn.Module) -> None:
    """NetworkError for weights that have shapes and no values."""
    tensors = chain(network.named_parameters(), network.named_buffers())
    if empty := [name for name, tensor in tensors if tensor.is_meta]:
        raise NetworkError(
            f"{empty[0]!r} of {name_of(network)} is on the meta device: it has a shape and no values. Build it "
            "outside torch.device('meta'), or give it values: network.to_empty(device='cpu'), then load_state_dict."
        )


def name_of(network: nn.Module) -> str:
    return (getattr(network, "pretrained_cfg", None) or {}).get("architecture") or type(network).__name__


@torch.no_grad()
def _try_input(network: nn.Module, input_size: tuple[int, int, int]) -> Any:
    """The network's output for a black image in eval mode, or the exception raised; the network is left as it was."""
    put_back = keep_modes(network)
    weight = next(network.parameters(), torch.zeros(()))
    try:
        return network.eval()(torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype))
    except Exception as error:  # whatever a stranger's forward raises is the answer
        return error
    finally:
        put_back()
