"""A method around a network, made anew and alike as often as a test asks, with a batch and a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from okdc import methods, networks
from okdc.methods import Method
from okdc.needs import Needs
from okdc.recipe import NetworkSettings

CLASSES, LABELS = 4, 64  # of a network by name, and of a training set, for methods that remember its images


@dataclass(frozen=True)
class Case:
    """What is tried: a method around a network, on noise."""

    method: type[Method] | str
    """Its class, or its name."""
    network: Callable[[], nn.Module] | str = "resnet20_cifar"
    """A name, or a function that makes it anew each time."""
    size: int = 32
    """Side of the images, pixels."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Those of the method."""
    wishes: dict[str, Any] = field(default_factory=dict)
    """Keywords of `okdc.build` beside the settings, such as members."""
    teacher: Callable[[], nn.Module] | None = None
    """A function that makes one, for a method that needs it; by default another such network."""

    @property
    def kind(self) -> type[Method]:
        """The class itself."""
        return methods.get(methods.name_of(self.method))

    def target(self) -> nn.Module:
        """A network for the method to be built around."""
        if callable(self.network):
            return self.network()
        return networks.load(NetworkSettings(model=self.network, img_size=self.size), CLASSES)

    def build(self, target: nn.Module | None = None) -> Method:
        """The method with its cohort, with the same weights each time."""
        torch.manual_seed(0)
        target = target or self.target()
        given: dict[str, Any] = {}
        if self.kind.needs_teacher:
            given["teacher"] = (self.teacher or self.target)()
        if "train_labels" in inspect.signature(self.kind.__init__).parameters:
            given["train_labels"] = torch.arange(LABELS) % CLASSES
        example = torch.randn(2, 3, self.size, self.size)
        return methods.build(target, example, self.kind, **given, **self.wishes, **self.settings)

    def needs(self) -> Needs:
        """What the method asks of its batches."""
        return self.kind.needs(**self.settings)

    def batch(self, method: Method, size: int = 8, seed: int = 1) -> tuple[Tensor, ...]:
        """A batch as the method asks for it, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            images, labels, *indices = methods.batch_of(method, self.needs(), size)
        return (images + labels.view(-1, 1, 1, 1) / 10 if labels.dim() == 1 else images, labels, *indices)

    def images(self, method: Method) -> Tensor:
        """Images as the cohort takes them: (B, C, H, W), or a view for each member where the method asks for that."""
        images = self.batch(method)[0]
        return images[0] if images.dim() == 5 and self.needs().views is not True else images

    def optimizer(self, method: Method) -> torch.optim.Optimizer:
        """Momentum, over what the method says is trained."""
        return torch.optim.SGD(method.param_groups(0.05), lr=0.05, momentum=0.9)

    def step(self, method: Method, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """One step on the same batch and random numbers each time; the losses by name."""
        torch.manual_seed(3)
        method.lr.fill_(0.05)
        batch = self.batch(method)
        parts = method.train()(*batch)
        optimizer.zero_grad()
        torch.stack([part for part in parts.values() if part.requires_grad]).sum().backward()
        method.before_step()
        optimizer.step()
        method.after_step([batch])
        return {name: value.item() for name, value in parts.items()}
