"""Everything of a step on fake CUDA tensors: what would meet a tensor of another device fails here, without a GPU.

A fake tensor has a shape, a type and a device, and no numbers, so a step that waits for a number fails, too. Backward
passes cannot be tried: autograd needs the real device.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor

from okdc.cohort import CohortOutput
from okdc.data.batchwise import Law
from okdc.data.resident import Normalised
from okdc.data.transforms import BatchAugmentation
from okdc.methods import Method
from okdc.methods.lmcl import Lmcl
from okdc.methods.switokd import Switokd
from okdc.recipe import DataSettings
from okdc.training.evaluation import evaluate
from okdc.training.machine import Machine
from tests.helpers.training import Tiny
from tests.methods.test_contract import CLASSIFYING, asked, build

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def autocast_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.autocast turns itself off where there is no GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def to_cuda(method: Method, mode: FakeTensorMode) -> None:
    """Give all that `method.to` reaches fake CUDA tensors for parameters and buffers; what is shared stays so."""
    made: dict[int, Tensor] = {}
    reached: list[nn.Module] = []
    usual = nn.Module._apply
    with mock.patch.object(nn.Module, "_apply", lambda self, fn, *rest: reached.append(self) or usual(self, fn, *rest)):
        method._apply(lambda tensor: tensor)

    def moved(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in made:
            fake = mode.from_tensor(tensor.detach()).to(CUDA)
            known = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if known else fake
        return made[id(tensor)]

    for module in reached:
        for held in (module._parameters, module._buffers):
            held.update({name: moved(tensor) for name, tensor in held.items() if tensor is not None})


def step(method: Method, batch: tuple[Tensor, ...], *dtypes: torch.dtype | None) -> None:
    """A step on fake CUDA tensors in each precision, what follows it included, and where its losses end up."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        to_cuda(method.train(), mode)
        fake = [mode.from_tensor(tensor) for tensor in batch]
        for dtype in dtypes:
            if isinstance(method, Lmcl):  # asks for the epoch when that was written; its 50th steps are backward passes
                method._epoch_version, method._counted = method.epoch._version, (0, 1)
            if isinstance(method, Switokd):
                method.decided = True  # by distances, for which `before_step` waits
            machine = Machine(CUDA, dtype, torch.channels_last)
            moved = machine.move(*fake)
            with machine.autocast():
                losses = method(*moved)
                method.after_step([moved])
                logits = method.cohort(torch.zeros(2, *batch[0].shape[-3:], device=CUDA)).logits
            assert losses and {(loss.device.type, loss.dtype) for loss in losses.values()} == {("cuda", torch.float32)}
            assert {z.dtype for z in logits} == {dtype or torch.float32}, "autocast was on"


@pytest.mark.parametrize("name", CLASSIFYING)
def test_a_step_of_every_method_stays_on_its_device(name: str) -> None:
    method = build(name)
    step(method, asked(method), None, torch.bfloat16)


class Planted(Tiny):
    """Takes a way that only a CPU knows."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.aside = what, torch.ones(3)  # no buffer, so that it stays where it is

    def losses(self, out: CohortOutput, labels: Tensor) -> dict[str, Tensor]:
        ways = {
            "numpy": lambda: torch.as_tensor(out.logits[0].detach().numpy()),
            "buffer": lambda: out.logits[0] * self.aside,
            "number": lambda: out.logits[0] * float(out.logits[0].mean()),
            "new": lambda: out.logits[0] + torch.zeros(out.logits[0].shape),
            "nothing": lambda: out.logits[0],
        }
        return {"ce": torch.nn.functional.cross_entropy(ways[self.what](), labels)}


@pytest.mark.parametrize("what", ["numpy", "buffer", "number", "new"])
def test_what_is_planted_is_found(what: str) -> None:
    batch = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    step(Planted("nothing"), batch, None)
    with pytest.raises((RuntimeError, TypeError, DataDependentOutputException)) as caught:
        step(Planted(what), batch, None)
    assert any(frame.name == "<lambda>" for frame in caught.traceback), "where it was planted"


def test_batches_and_views_move_to_the_device_in_its_layout() -> None:
    machine = Machine(CUDA, torch.bfloat16, torch.channels_last)
    with FakeTensorMode():
        for shape in ((4, 3, 8, 8), (2, 4, 3, 8, 8)):
            images, labels, indices = machine.move(torch.zeros(shape), torch.zeros(4), torch.zeros(4))
            assert {each.device.type for each in (images, labels, indices)} == {"cuda"} and images.shape == shape
            assert images.flatten(0, -4).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "law",
    [
        Law((8, 8), padding=2, hflip=0.5, vflip=0.5),
        Law((8, 8), scale=(0.1, 1.0), ratio=(0.75, 1.33), interpolation="bilinear", hflip=0.5),
        Law((8, 8), scale=(0.1, 1.0), ratio=(0.75, 1.33), interpolation="bicubic"),
    ],
    ids=["padded", "bilinear", "bicubic"],
)
def test_resident_images_are_augmented_where_they_are(law: Law) -> None:
    config = {"input_size": (3, 8, 8), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    settings = DataSettings(mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.5)
    with FakeTensorMode():
        images = torch.zeros(6, 3, 10, 10, dtype=torch.uint8, device=CUDA)
        shown = Normalised(config, CUDA)(law(images, torch.arange(6, device=CUDA)))
        augment = BatchAugmentation(settings, 4, seed=1, device=CUDA)
        batch = augment(shown, torch.zeros(6, dtype=torch.long, device=CUDA), 0, 0, [0] * 6)
    assert {each.device.type for each in batch} == {"cuda"} and batch[0].shape == (6, 3, 8, 8)


def test_evaluation_brings_numbers_home_when_all_is_computed() -> None:
    method, given = Tiny(), []

    def images() -> Iterator[tuple[Tensor, Tensor]]:
        for count in (4, 3):
            yield torch.zeros(count, 3, 8, 8), torch.zeros(count, dtype=torch.long)
        given.append("all")

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        to_cuda(method, mode)
        state = SimpleNamespace(method=method, student=method.cohort.target, best=None)
        machine = Machine(CUDA, torch.bfloat16, torch.channels_last)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)) as caught:
            evaluate(state, images(), machine, SimpleNamespace(signal=None))  # type: ignore[arg-type]
    assert given == ["all"] and any(frame.name in ("value", "others", "counts") for frame in caught.traceback)
