"""How a loader of one's own prepares its images: read from plain transforms, checked where it is said, else unknown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_loader, create_transform
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision.models import ResNet18_Weights
from torchvision.transforms import transforms as v1
from torchvision.transforms import v2

from okdc.data import Data, load, open_source, own_images, state, wrap
from okdc.data.own_loader import OwnBatches, OwnValidation
from okdc.errors import DataError
from okdc.recipe import DataSettings
from okdc.system import shipped
from okdc.verification import take

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pictures(Dataset):
    """Smooth pictures of 40 by 48 pixels, class by class."""

    def __init__(self, transform: Any, size: tuple[int, int] = (40, 48)) -> None:
        random = np.random.default_rng(0)
        small = [Image.fromarray(random.integers(0, 256, (5, 6, 3), dtype=np.uint8)) for _ in range(24)]
        self.images = [image.resize((size[1], size[0]), Image.Resampling.BICUBIC) for image in small]
        self.targets, self.transform = [i // 6 for i in range(24)], transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return self.transform(image) if self.transform else image, self.targets[index]


def loader(*transform: Any, batch_size: int = 8, **options: Any) -> DataLoader:
    return DataLoader(Pictures(v1.Compose(transform)), batch_size=batch_size, **options)


def known(validation: Any, **stated: Any) -> Data:
    return wrap(validation, validation, stated=stated)


NORMAL = v1.Normalize(MEAN, STD)
READ = {
    "v1": ([v1.Resize(32), v1.CenterCrop(28), v1.ToTensor(), NORMAL], "bilinear", 28 / 32, "center"),
    "v2": (
        [v2.Resize(32, v2.InterpolationMode.BICUBIC), v2.CenterCrop(28), v2.ToImage(),
         v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)], "bicubic", 28 / 32, "center",
    ),
    "v2, tensors resized": (
        [v2.ToImage(), v2.Resize(32), v2.CenterCrop(28), v2.ToDtype(torch.float32, scale=True),
         v2.Normalize(MEAN, STD)], "bilinear", 28 / 32, "center",
    ),
    "squashed": ([v1.Resize((28, 28)), v1.ToTensor(), NORMAL], "bilinear", 1.0, "squash"),
    "not whole": ([v1.Resize(30), v1.CenterCrop(28), v1.ToTensor(), NORMAL], "bilinear", 28 / 30, "center"),
    "timm": ([create_transform((3, 28, 28), mean=MEAN, std=STD, crop_pct=0.875)], "bilinear", 0.875, "center"),
    "nested": ([v1.Compose([v1.Resize(32), v1.CenterCrop(28)]), v1.ToTensor(), NORMAL], "bilinear", 0.875, "center"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_plain_transform_is_read_and_predict_does_the_same(name: str) -> None:
    transform, interpolation, crop_pct, crop_mode = READ[name]
    data = known(loader(*transform))
    found = data.preprocess
    assert found["input_size"] == (3, 28, 28) and "assumed" not in found
    assert (found["interpolation"], found["crop_mode"]) == (interpolation, crop_mode)
    assert found["crop_pct"] == pytest.approx(crop_pct)
    assert np.allclose(found["mean"], MEAN) and np.allclose(found["std"], STD)
    predict = shipped.load(shipped.folder("export") / "predict.py")
    raw = list(data.validation_images or ())
    made = np.stack([predict.preprocess(image, found) for image, _ in raw])
    given = torch.cat([images for images, _ in data.validation or ()]).numpy()
    assert [label for _, label in raw] == torch.cat([labels for _, labels in data.validation or ()]).tolist()
    assert np.abs(made - given).max() < (2.5 / 255 / 0.22 if "tensors" in name else 1e-5)


def test_presets_and_timms_loader_are_read_too() -> None:
    preset = ResNet18_Weights.DEFAULT.transforms(crop_size=28, resize_size=32)
    data = known(DataLoader(Pictures(preset), batch_size=8))
    assert data.preprocess["crop_pct"] == 0.875 and data.preprocess["mean"] == MEAN
    timms = create_loader(
        Pictures(None), (3, 28, 28), batch_size=8, mean=MEAN, std=STD, crop_pct=0.875, interpolation="bicubic",
        num_workers=0, persistent_workers=False, device=torch.device("cpu"),
    )  # fmt: skip
    data = known(timms)
    assert np.allclose(data.preprocess["std"], STD) and data.preprocess["interpolation"] == "bicubic"
    assert len(list(data.validation_images or ())) == 24


@pytest.mark.parametrize(
    "transform",
    [
        [v1.Resize(32), v1.CenterCrop(28), v1.ToTensor(), lambda x: (x - 0.45) / 0.25],
        [v1.Resize(28), v1.CenterCrop(28), v1.Grayscale(3), v1.ToTensor()],
        [v1.Resize((28, 30)), v1.CenterCrop(28), v1.ToTensor()],
        [v1.CenterCrop(28), v1.ToTensor()],
        [v1.ToTensor(), v1.Resize((28, 28), antialias=True)],
        [v2.ToImage(), v2.Resize((28, 28)), v2.ToDtype(torch.float32)],
    ],
    ids=["a function", "grey", "another shape", "no resize", "floats resized", "not scaled"],
)
def test_what_is_not_plain_stays_unknown(transform: list[Any]) -> None:
    data = known(loader(*transform))
    assert data.preprocess == {"input_size": (3, 28, 28)} and data.validation_images is None


class Negative(Pictures):
    """Does more than its transform says."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = super().__getitem__(index)
        return -image if isinstance(image, torch.Tensor) else image, label


def test_a_transform_that_does_not_tell_all_stays_unknown() -> None:
    data = known(DataLoader(Negative(v1.Compose(READ["v1"][0])), batch_size=8))
    assert data.preprocess == {"input_size": (3, 28, 28)}
    assert known(loader(*READ["v1"][0], shuffle=True)).preprocess == {"input_size": (3, 28, 28)}
    assert known(list(loader(*READ["v1"][0]))).preprocess == {"input_size": (3, 28, 28)}


def test_images_that_have_their_size_leave_the_resize_to_be_said() -> None:
    plain = [v1.ToTensor(), NORMAL]
    found = known(DataLoader(Pictures(v1.Compose(plain), (32, 32)), batch_size=8)).preprocess
    assert found["assumed"] == ["interpolation", "crop_pct"] and np.allclose(found["mean"], MEAN)
    said = known(DataLoader(Pictures(v1.Compose(plain), (32, 32)), batch_size=8), interpolation="bicubic").preprocess
    assert said["assumed"] == ["crop_pct"] and said["interpolation"] == "bicubic"


def test_what_is_said_is_checked_against_the_images() -> None:
    batches = list(loader(v1.Resize((28, 28)), v1.ToTensor(), lambda x: (x - 0.45) / 0.25))
    found = known(batches, mean=[0.45], std=[0.25]).preprocess
    assert found["mean"] == (0.45,) * 3 and found["std"] == (0.25,) * 3
    assert found["assumed"] == ["interpolation", "crop_pct"] and found["crop_mode"] == "center"
    whole = known(batches, mean=[0.45], std=[0.25], interpolation="bicubic", crop_pct=1.0).preprocess
    assert "assumed" not in whole and whole["interpolation"] == "bicubic"
    for stated, words in [
        ({"mean": [0.0], "std": [1.0]}, r"channel \d goes from 0 to 1, and the loader's first batch from -1\.\d"),
        ({"mean": [0.45]}, "std not given beside mean"),
        ({"crop_pct": 0.9}, "mean and std not given beside crop_pct"),
        ({"mean": [0.45] * 2, "std": [0.25]}, "mean has 2 numbers, and the images have 3 channels"),
    ]:
        with pytest.raises(DataError, match=words):
            known(batches, **stated)


def test_images_that_nobody_normalised_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    plain = list(loader(v1.Resize((28, 28)), v1.ToTensor()))
    with pytest.raises(DataError, match="no pixel of its first batch is darker than the mean"):
        known(plain, mean=[0.5], std=[0.25])
    assert known(plain, mean=[0], std=[1]).preprocess["mean"] == (0, 0, 0)
    numbers = [((images * 255).round(), labels) for images, labels in plain]
    with pytest.raises(DataError, match="They are whole numbers, as before any normalisation"):
        known(numbers, mean=MEAN, std=STD)
    with caplog.at_level("WARNING", "okdc"):
        assert known(numbers).preprocess == {"input_size": (3, 28, 28)}
    assert "std=[0.00392157]" in caplog.text
    assert known(numbers, mean=[0], std=[1 / 255]).preprocess["std"] == (1 / 255,) * 3


def test_what_is_said_must_be_what_the_raw_images_show() -> None:
    custom = loader(v1.Resize(32), v1.CenterCrop(28), v1.ToTensor(), lambda x: (x - 0.45) / 0.25)
    right = {"mean": [0.45], "std": [0.25], "interpolation": "bilinear", "crop_pct": 0.875}
    data = known(custom, **right)
    assert len(list(data.validation_images or ())) == 24
    with pytest.raises(DataError, match="differ from what it gives by up to"):
        known(custom, **right | {"crop_pct": 1.0})
    with pytest.raises(DataError, match="the loader's own transform says"):
        known(loader(*READ["v1"][0]), mean=[0.45], std=[0.25])
    assert "assumed" not in known(loader(*READ["v1"][0]), mean=MEAN, std=STD).preprocess


def test_pixels_of_8_bits_show_a_wrong_std_that_their_range_allows() -> None:
    plain = [v1.Resize(32), v1.CenterCrop(28), v1.ToTensor(), lambda x: (x - 0.45) / 0.25]
    for wrong in ({"mean": [0.5], "std": [0.1]}, {"mean": [0.45], "std": [0.2]}, {"mean": [0.448], "std": [0.25]}):
        with pytest.raises(DataError, match=r"in steps of 0\.01569 .* std 0\.25\. Give those"):
            known(list(loader(*plain)), **wrong)
    assert known(list(loader(*plain)), mean=[0.45], std=[0.25]).preprocess["std"] == (0.25,) * 3
    noisy = [*plain, lambda x: x + 0.001 * torch.rand(x.shape)]  # these could have been anything
    assert known(list(loader(*noisy)), mean=[0.5], std=[0.1]).preprocess["std"] == (0.1,) * 3


def test_what_is_said_later_is_checked_alike() -> None:
    batches = list(loader(v1.Resize((28, 28)), v1.ToTensor(), lambda x: (x - 0.45) / 0.25))
    for data in (known(batches), wrap(batches)):
        assert state(data, {"mean": [0.45], "std": [0.25]}).preprocess["mean"] == (0.45,) * 3
        with pytest.raises(DataError, match="goes from 0 to 1"):
            state(data, {"mean": [0.0], "std": [1.0]})
    settings = DataSettings(data="digits", workers=0)
    config = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}
    named = load(
        open_source(settings, 0), settings, config | {"crop_mode": "center"}, batch_size=8, validation_batch_size=None,
        seed=0, device="cpu",
    )  # fmt: skip
    with pytest.raises(DataError, match="the student was trained with"):
        state(named, {"mean": [0.1]})


def test_labels_are_known_without_decoding_where_the_data_set_lists_them() -> None:
    plain = [v1.Resize((28, 28)), v1.ToTensor()]
    assert own_images.labels(loader(*plain)).tolist() == [i // 6 for i in range(24)]  # type: ignore[union-attr]
    assert own_images.labels(loader(*plain, batch_size=7, drop_last=True)).tolist() == [i // 6 for i in range(21)]  # type: ignore[union-attr]
    part = DataLoader(Subset(Pictures(v1.Compose(plain)), [0, 23, 7]), batch_size=2)
    assert own_images.labels(part).tolist() == [0, 3, 1]  # type: ignore[union-attr]
    assert own_images.labels(DataLoader(TensorDataset(torch.zeros(3, 1), torch.tensor([1, 0, 1])))).tolist() == [
        1,
        0,
        1,
    ]  # type: ignore[union-attr]
    assert own_images.labels(loader(*plain, shuffle=True)) is None
    assert (
        OwnBatches(loader(*plain), 3, 4, 0).in_order and not OwnBatches(loader(*plain, shuffle=True), 3, 4, 0).in_order
    )
    chosen = take(known(loader(*plain)), 8)
    assert torch.cat([labels for _, labels in chosen.validation]).bincount().tolist() == [2, 2, 2, 2]
    assert OwnValidation([(torch.zeros(2, 3, 4, 4), torch.eye(2))], 2, 0).labels.tolist() == [0, 1]  # type: ignore[union-attr]


def test_a_sample_of_named_data_reads_those_images_alone() -> None:
    settings = DataSettings(data="digits", workers=0, resident="off")
    config = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}
    source = open_source(settings, 0)
    both = []
    for each in (settings, replace(settings, resident="on")):
        data = load(
            source, each, config | {"crop_mode": "center"}, batch_size=8, validation_batch_size=16, seed=0, device="cpu"
        )
        chosen = take(data, 40)
        images, labels = (torch.cat(parts) for parts in zip(*chosen.validation))
        assert labels.bincount().tolist() == [4] * 10
        assert [label for _, label in chosen.validation_images] == labels.tolist()
        assert len(list(chosen.validation)) == 3 and len(data.validation_images.images) > 300  # type: ignore[union-attr]
        both.append(images)
    assert torch.equal(*both)
