"""A tiny network to export, and what a file made of it must give."""

from __future__ import annotations

import numpy as np
import timm
import torch
from torch import nn

EXAMPLE = torch.zeros(4, 3, 32, 32)


def tiny(name: str = "test_resnet", **settings) -> nn.Module:
    """A tiny network of timm's whose batch statistics have moved, left in train mode."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7, **settings).train()
    with torch.no_grad():
        network(torch.randn(4, 3, 32, 32))
    return network


def assert_same(run, network: nn.Module, limit: float = 1e-5) -> None:
    network.eval()
    for batch in (1, 3, 5):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = network(images).numpy()
        given = run(images.numpy())
        assert given.shape == expected.shape and given.dtype == np.float32
        assert np.abs(given - expected).max() / np.abs(expected).max() <= limit
