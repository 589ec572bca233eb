"""What could never ship is refused before the first epoch, and before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import okdc
from okdc import deploy
from okdc.errors import ExportError, NetworkError
from okdc.recipe import ExportSettings
from tests.helpers.networks import Tiny

BATCHES = [(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4)]


class Dropping(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x))


class Untraceable(Tiny):
    """Looks at a value and counts its images: no exporter gets that with a free batch."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.reshape(int(x.shape[0]), 4) if logits.abs().sum().item() >= 0 else x


def test_a_network_that_answers_anew_each_time_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="each time"):
        okdc.compress(Dropping(), BATCHES, BATCHES, method="baseline", epochs=1, output=tmp_path, onnx=False)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_exported_is_refused_where_that_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=r"^torch\.onnx cannot export .* torchscript: .*--no-onnx") as caught:
        okdc.compress(Untraceable(), BATCHES, BATCHES, method="baseline", epochs=1, output=tmp_path)
    said = capsys.readouterr().err
    assert "\n" not in str(caught.value) and "data-dependent" in said and "\x1b" not in said
    assert list(tmp_path.iterdir()) == []
    deploy.refuse_unexportable(Untraceable(), (3, 16, 16), ExportSettings(onnx=False))
