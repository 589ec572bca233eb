"""Trains whole networks side by side; each learns from the predictions and the feature maps of the one before it.

Use it when you can afford a whole further network, and want its feature maps to teach as well as its predictions. Small
networks, called critics, learn to tell the feature maps of two networks apart; each network learns to fool its critic.

Paper: I. Chung, S. Park, J. Kim, N. Kwak, Feature-map-level Online Adversarial Knowledge Distillation, ICML 2020, PMLR
    119, arXiv 2002.01775.
Code: The authors published none. The layouts of critics and transfer layers are okdc's own.
Differs: One backward pass and one optimizer give all three gradients; the paper alternates SGD and Adam (2e-5). Critics
    see constant maps, and networks see constant critics. Instead of Adam's small rate, the adversarial loss has a
    weight, and the critics learn at critic_lr times the networks' rate. The predictions of a peer are constants. If
    critics win outright (their losses come near 0), spectral_norm=True or a lower critic_lr holds them back.
Costs: Each peer is one whole network. Each network has a critic (a 3x3 convolution on the last map), which runs three
    times.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from okdc.cohort import Cohort, CohortOutput
from okdc.methods.shared.base import Method
from okdc.methods.shared.parts import on_one_grid


class Critic(nn.Module):
    """Tells a teacher's map (1) from its own network's (0): maps (B, D, H, W) to scores (B,) in 0..1."""

    def __init__(self, width: int, hidden: int, spectral_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, 1, 1)
        nn.init.normal_(self.conv1.weight, std=0.02)
        nn.init.normal_(self.conv2.weight, std=0.02)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        for conv in (self.conv1, self.conv2) if spectral_norm else ():
            parametrizations.spectral_norm(conv)

    def forward(self, maps: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):  # small differences near 0 and 1 decide
            x = self.bn(self.conv1(maps.to(self.conv1.weight.dtype)))
            return torch.sigmoid(self.conv2(F.leaky_relu(x, 0.2)).mean((1, 2, 3)))

    def as_constant(self, maps: Tensor) -> Tensor:
        """The same scores, whose gradient reaches the maps alone; the running statistics do not count this call."""
        parameters = {name: p.detach() for name, p in self.named_parameters()}
        buffers = {name: b.clone() for name, b in self.named_buffers()}
        return functional_call(self, parameters | buffers, (maps,))


class Transfer(nn.Sequential):
    """Brings a map of another width (B, D, H, W) to the target's."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        nn.init.normal_(self[0].weight, std=0.02)  # type: ignore[arg-type]


class Afd(Method):
    """Adversarial Feature-map Distillation: each network learns from the one before it in a ring; the target ships."""

    share = "none"
    taps = ("feature_maps",)
    tasks = ("classify", "multilabel", "pose")

    def __init__(
        self,
        cohort: Cohort,
        *,
        temperature: float = 3.0,
        kd_weight: float = 1.0,
        adversarial_weight: float = 1.0,
        critic_lr: float = 0.1,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__(cohort)
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.adversarial_weight = adversarial_weight
        self.critic_lr = critic_lr
        width = cohort.feature_widths[0]
        self.transfers = nn.ModuleList(
            nn.Identity() if w == width else Transfer(w, width) for w in cohort.feature_widths
        )
        self.critics = nn.ModuleList(Critic(width, width, spectral_norm) for _ in cohort.feature_widths)

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        parts, maps = {}, self.common_maps(out)
        for k, name in enumerate(self.cohort.names):
            # The ring: k - 1 is the teacher of k, and the last network that of the first.
            parts[f"ce/{name}"] = self.task.supervised(out.logits[k], labels)
            distance = self.task.distance(out.logits[k], out.logits[k - 1], labels, self.temperature)
            parts[f"kd/{name}"] = self.kd_weight * distance
        for k, name in enumerate(self.cohort.names):
            real, fake = self.critics[k](maps[k - 1].detach()), self.critics[k](maps[k].detach())
            parts[f"critic/{name}"] = (1 - real).square().mean() + fake.square().mean()
            fooled = (1 - self.critics[k].as_constant(maps[k])).square().mean()  # type: ignore[operator]
            parts[f"adversarial/{name}"] = self.adversarial_weight * fooled
        return parts

    def common_maps(self, out: CohortOutput) -> list[Tensor]:
        """The members' feature maps (B, D, H, W) in one shape: the target's width, the smallest side of all."""
        height, width = self.cohort.anatomy.input_size[1:]
        maps = on_one_grid(out.feature_maps, height / width)
        return [transfer(x) for transfer, x in zip(self.transfers, maps, strict=True)]

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        networks = [*self.cohort.parameters(), *self.transfers.parameters()]
        return [
            {"params": [p for p in networks if p.requires_grad], "lr": lr},
            {"params": list(self.critics.parameters()), "lr": lr * self.critic_lr},
        ]
