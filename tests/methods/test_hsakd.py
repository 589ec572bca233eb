"""HSAKD beside its formula, written out image by image, turn by turn and classifier by classifier."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import okdc
from okdc.errors import CutError, RecipeError
from okdc.methods.hsakd import Hsakd
from tests.helpers.networks import Depthwise, Tiny, Tokens


def method(network: nn.Module | None = None, size: tuple[int, int] = (32, 32), **settings: float) -> Hsakd:
    torch.manual_seed(0)
    return okdc.build(network or Depthwise(), torch.randn(2, 3, *size), Hsakd, **settings)  # type: ignore[return-value]


def turned(image: Tensor, turn: int) -> Tensor:
    """A quarter turn is the transpose, upside down."""
    for _ in range(turn):
        image = image.transpose(1, 2).flip(1)
    return image


def surprise(logits: Tensor, label: int) -> float:
    row = logits.tolist()
    return math.log(sum(math.exp(z) for z in row)) - row[label]


def test_losses_are_those_of_the_formula() -> None:
    hsakd = method(joint_weight=0.7).eval()  # batch norm at rest, so that images can be run one by one
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([3, 0, 2])
    parts = hsakd(images, labels)
    assert list(parts) == ["ce/target", "joint/joint", "joint/branch1"]
    own, last, first = 0.0, 0.0, 0.0
    for image, label in zip(images, labels.tolist(), strict=True):
        own += surprise(hsakd.cohort.target(image[None])[0], label)
        for turn in range(4):
            out = hsakd.cohort(turned(image, turn)[None])
            last += surprise(hsakd.joint(out.embeddings[0])[0], 4 * label + turn)
            first += surprise(out.logits[1][0], 4 * label + turn)
    expected = {"ce/target": own / 3, "joint/joint": 0.7 * last / 4 / 3, "joint/branch1": 0.7 * first / 4 / 3}
    assert {name: value.item() for name, value in parts.items()} == pytest.approx(expected, rel=1e-5)


def test_shares_of_labels_are_shared_by_the_joint_labels() -> None:
    hsakd, draw = method(), torch.Generator().manual_seed(3)
    upright, joint = torch.randn(2, 4, generator=draw), [torch.randn(8, 16, generator=draw) for _ in range(2)]
    shares = torch.tensor([[0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 0.1, 0.9]])
    mixed = hsakd.joint_losses(upright, joint, shares)
    ones = [hsakd.joint_losses(upright, joint, torch.tensor(pair)) for pair in ([0, 2], [1, 2], [0, 3], [1, 3])]
    for name, value in mixed.items():  # linear in the labels of each image, which the four pairs are the corners of
        weights = (0.6 * 0.1, 0.4 * 0.1, 0.6 * 0.9, 0.4 * 0.9)
        torch.testing.assert_close(value, sum(w * each[name] for w, each in zip(weights, ones, strict=True)))


def test_branches_have_classifiers_of_the_joint_classes_and_are_scored_by_those_that_are_not_turned() -> None:
    hsakd = method(Tokens()).eval()
    assert [b.head.out_features for b in hsakd.cohort.branches] == [16] * 3
    assert [cost.cut for cost in hsakd.costs()] == [None, "blocks.0", "blocks.2", "blocks.3", "the start"]
    assert hsakd.costs()[1].grown == "16 outputs"
    out = hsakd.cohort(torch.randn(5, 3, 32, 32))
    said = hsakd.said(out)
    assert hsakd.learners == ("target", "joint", "branch1", "branch2", "branch3") and len(said) == 5
    assert torch.equal(said[2], out.logits[1][:, [0, 4, 8, 12]])
    torch.testing.assert_close(hsakd.ensemble(out), sum(said) / 5)
    assert hsakd.strip().head.out_features == 4
    assert len(method(Tokens(), members=2).cohort) == 2 and method(Tokens(), members=2).cohort.cut == "blocks.3"


def test_what_cannot_be_turned_or_given_a_classifier_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"these are 32x16: expected square ones"):
        method(Tiny(), (32, 16))
    with pytest.raises(RecipeError, match="leave out --peers, --share and --members 1"):
        method(Tiny(), share="none")  # type: ignore[arg-type]

    class Scaled(nn.Linear):
        """A classifier that is no plain layer."""

    odd = Tiny()
    odd.head = Scaled(32, 4)
    with pytest.raises(CutError, match="'head' is a Scaled; expected a Linear layer"):
        method(odd)
    assert not any(module._forward_hooks for module in odd.modules())
