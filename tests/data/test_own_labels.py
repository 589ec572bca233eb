"""Labels and images of a loader of one's own: what is taken, what is refused, and whether the advice helps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from okdc.data import wrap
from okdc.errors import DataError

IMAGES = torch.zeros(4, 3, 4, 4)
LABELS = torch.tensor([0, 1, 2, 1])
ONE_HOT = torch.eye(3)[LABELS]
SHARES = torch.tensor([[0.5, 0.5, 0.0]] * 4)


@pytest.mark.parametrize("name", ["two\nlines", "two\rlines", ""])
def test_a_class_name_that_is_no_line_is_refused_before_training(name: str) -> None:
    with pytest.raises(DataError, match="no line of text"):
        wrap([(IMAGES, LABELS)], classes=["a", "b", name])
    assert wrap([(IMAGES, LABELS)], classes=["a", "b", "c\u2028d\x85e"]).classes[2] == "c\u2028d\x85e"


@pytest.mark.parametrize(
    ("labels", "words", "advice"),
    [
        (ONE_HOT + torch.eye(3)[0], "4 of 4 images.*else than 1, such as 2", "labels / labels.sum(1, keepdim=True)"),
        (ONE_HOT * torch.tensor([[1.0], [0.0], [1.0], [1.0]]), "1 of 4 images.*such as 0.*leave out", None),
        (ONE_HOT.long() + torch.eye(3).long()[0], "such as 2", None),
        (ONE_HOT * 3 - 1, "go down to -1", "labels.softmax(1)"),
        (SHARES / torch.tensor([[1.0], [1.0], [0.0], [1.0]]), "NaN or infinite.*by 0", None),
        (ONE_HOT.long(), "one-hot", "labels.argmax(1)"),
        (ONE_HOT.bool(), "one-hot", "labels.long().argmax(1)"),
        (LABELS[:, None], r"shape \(4, 1\)", "labels.squeeze(1)"),
        (LABELS[:, None].float(), r"shape \(4, 1\)", "labels.squeeze(1).long()"),
        (LABELS.short(), "torch.int16", "labels.long()"),
        (LABELS[None], "for 4 images", None),
        (torch.tensor(1), "for 4 images", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("role", ["training", "validation"])
def test_labels_that_are_no_classes_are_refused_with_a_way_that_works(
    labels: Tensor, words: str, advice: str | None, role: str
) -> None:
    def given(labels: Tensor) -> None:
        batches = [(IMAGES, labels)]
        wrap(*([batches] if role == "training" else [[(IMAGES, LABELS)], batches]))

    with pytest.raises(DataError, match=f"(?s){words}") as caught:
        given(labels)
    assert role in str(caught.value)
    if advice:
        assert advice in str(caught.value)
        mended = eval(advice, {"labels": labels})
        if role == "training" or not mended.is_floating_point():
            given(mended)


def test_a_batch_that_is_met_late_is_looked_at_too() -> None:
    late = [(IMAGES, ONE_HOT), (IMAGES, ONE_HOT * 2)]
    with pytest.raises(DataError, match="such as 2"):
        list(wrap(late, num_classes=3).train.batches(0))


def test_one_hot_rows_validate_as_they_train_and_shares_do_not() -> None:
    data = wrap([(IMAGES, ONE_HOT)], [(IMAGES, ONE_HOT)])
    assert torch.equal(next(data.train.batches(0))[1], ONE_HOT)
    assert torch.equal(next(iter(data.validation or ()))[1], LABELS)
    with pytest.raises(DataError, match=r"shares of several classes.*labels\.argmax\(1\)"):
        wrap([(IMAGES, SHARES)], [(IMAGES, SHARES)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shares_of_sixteen_bits_are_shares(dtype: torch.dtype) -> None:
    smooth = (torch.eye(1000)[[0, 5, 999, 2]] * 0.9 + 0.1 / 1000).to(dtype)
    assert next(wrap([(IMAGES, smooth)]).train.batches(0))[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_images_of_other_float_types_train_as_float32(dtype: torch.dtype) -> None:
    images = torch.rand(4, 3, 32, 32).to(dtype)
    data = wrap([(images, LABELS)], [(images, LABELS)])
    for given, _ in (next(data.train.batches(0)), next(iter(data.validation or ()))):
        assert given.dtype == torch.float32 and torch.equal(given, images.float())


def test_images_that_hold_nan_are_refused_before_training() -> None:
    with pytest.raises(DataError, match="validation loader gave images that hold NaN"):
        wrap([(IMAGES, LABELS)], [(IMAGES / 0, LABELS)])
