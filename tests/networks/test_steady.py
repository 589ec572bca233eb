"""A network whose answers could not be verified or shipped is refused in words, and left as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from okdc.errors import NetworkError
from okdc.networks import refuse_unsteady
from tests.helpers.networks import Tiny

SIZE = (3, 16, 16)


class Dropping(Tiny):
    """Drops in evaluation mode too: the usual mistake."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.late(self.early(self.stem(x))).mean((2, 3))))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Counting(nn.Module):
    """Remembers, in a buffer, how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        return x * self.asked


class WithPart(Tiny):
    """A part between the stages, whose effect a new network hides: its classifier begins as nothing."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.ReLU(), part)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.part(self.early(self.stem(x)))).mean((2, 3)))


class Centred(Tiny):
    """Takes the mean of the batch from each image."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.early(self.stem(x))
        return self.head(self.late(maps - maps.mean(0, keepdim=True)).mean((2, 3)))


class Ending(Tiny):
    def __init__(self, end: nn.Module) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(super().forward(x))


class FixedBatch(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(self.stem(x))).mean((2, 3)).view(1, 32))


class OnlyInTraining(Tiny):
    """Noise, functional dropout and statistics of the batch where they belong."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.early(self.stem(x + 0.1 * torch.randn_like(x) if self.training else x))
        maps = maps - maps.mean(0) if self.training else maps
        return self.head(F.dropout(self.late(maps).mean((2, 3)), 0.5, self.training))


ALONE = "for an image alone than beside others .* It begins in "


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Dropping(), "each time .* It begins in Dropping's own forward, before 'head' is called"),
        (WithPart(Noisy()), r"each time .* It begins in 'part\.1' \(Noisy\)\. Dropout and noise"),
        (WithPart(Counting()), r"each time .* It begins in 'part\.1' \(Counting\)"),
        (WithPart(nn.BatchNorm2d(16, track_running_stats=False)), ALONE + r"'part\.1' \(BatchNorm2d\)"),
        (Centred(), ALONE + "Centred's own forward, before 'late"),
        (Ending(nn.Softmax(1)), r"ends in a softmax.* Leave it out: torch\.nn\.Identity\(\) in place of 'end'"),
        (Ending(nn.Sequential(nn.Softmax(1), nn.Identity())), "ends in a softmax.* return what goes into it"),
        (FixedBatch(), "takes one image, and cannot take 4 at once: .*view"),
        (nn.DataParallel(Tiny()), r"wrapped by DataParallel.*net\.module"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_ship_is_refused_and_left_as_it_was(network: nn.Module, words: str) -> None:
    weights, state = {key: value.clone() for key, value in network.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(NetworkError, match=words):
        refuse_unsteady(network, SIZE)
    assert network.training and not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "network",
    [
        Tiny(), OnlyInTraining(), WithPart(nn.Dropout()), WithPart(nn.BatchNorm2d(16)), WithPart(nn.InstanceNorm2d(16)),
        Ending(nn.LogSoftmax(1)),  # to a softmax and a cross-entropy the same as logits
        Ending(nn.Sigmoid()),
    ],
    ids=lambda network: type(network).__name__,
)  # fmt: skip
def test_what_can_ship_is_not(network: nn.Module) -> None:
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    refuse_unsteady(network, SIZE)
    assert network.training and all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
