"""Training of a quantised ONNX graph (QDQ): the numbers behind its stored levels, and its scales.

Used by to_onnx_int8_finetuned.py; needs onnx_in_torch.py beside it, torch, numpy and onnx.
"""

from __future__ import annotations

import importlib
import sys
import time
from datetime import timedelta
from types import ModuleType
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

_BATCH = 32
_RATE = 5e-5  # of weights and biases, in units of the largest
_RATE_OF_SCALES = 1e-2  # of their logarithms
_SEED = 0
_SAID = 25  # steps between two lines of progress
_SUFFIX = "_quantized"  # what onnxruntime adds to the name of a weight


def finetune(
    quantized: onnx.ModelProto,
    plain: onnx.ModelProto,
    images: np.ndarray,
    logits: np.ndarray,
    steps: int,
    device: str = "cpu",
) -> onnx.ModelProto:
    """The quantised model after so many steps in which it learned to give `logits` (N, classes) for its images.

    plain: the float32 model from which it was quantised. images: (N, C, H, W) float32. The loss is `noise`; Adam, its
    rate falling to 0 by a cosine. Raises RuntimeError for a network that torch cannot compute.
    """
    student = Student(quantized, plain, device)
    inputs, teacher = torch.from_numpy(images), torch.from_numpy(logits)
    groups = (student.numbers, _RATE), (student.growth, _RATE_OF_SCALES)
    optimizer = torch.optim.Adam([{"params": list(each.values()), "lr": rate} for each, rate in groups])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, order = torch.Generator().manual_seed(_SEED), torch.empty(0, dtype=torch.int64)
    started, losses = time.monotonic(), list[float]()
    for step in range(1, steps + 1):
        if len(order) < _BATCH:
            order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
        batch, order = order[:_BATCH], order[_BATCH:]
        loss = noise(student(inputs[batch].to(device)), teacher[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % _SAID == 0:
            left = timedelta(seconds=round((time.monotonic() - started) / step * (steps - step)))
            mean = 100 * sum(losses[-_SAID:]) / _SAID
            print(f"int8-finetune step {step}/{steps}: noise {mean:.2f} % · {left} left", file=sys.stderr, flush=True)
    return student.model()


def noise(logits: Tensor, exact: Tensor) -> Tensor:
    """How far logits (B, classes) are from `exact`, as a share of how far those are from 0; a mean over the images.

    Each image counts alike, and by the distance itself: by its square, a few images whose activations are cut off would
    hide what helps all others.
    """
    away, length = (torch.linalg.vector_norm(each.flatten(1), dim=1) for each in (logits - exact, exact))
    return (away / length.clamp(min=1e-6)).mean()


class _Stored(NamedTuple):
    """Levels that are in the file, of a weight or a bias: the names of their scale and zero point, and their axis."""

    scale: str
    zero: str
    axis: int


class Student:
    """A quantised model whose weights, biases and scales can be trained: images (B, C, H, W) -> logits (B, classes).

    One learning rate suits all numbers and another all scales: numbers are in units of the largest of their channel
    (biases, of all), and a scale is the logarithm of how much it has grown. Zero points stay as they are.
    """

    def __init__(self, quantized: onnx.ModelProto, plain: onnx.ModelProto, device: str = "cpu") -> None:
        self.maths = _onnx_in_torch()
        self.network = self.maths.Network(quantized, device)
        self.file: dict[str, Tensor] = self.network.stored
        nodes = list(zip(quantized.graph.node, self.network.attributes, strict=True))
        pairs = [(node, a) for node, a in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        self.stored = {
            node.input[0]: _Stored(node.input[1], node.input[2], a.get("axis", 1))
            for node, a in pairs
            if node.input[0] in self.file
        }
        made = {node.output[0]: node.input for node, _ in pairs}
        # The scale of a bias is that of the inputs times that of the weight: a runtime adds up in such steps.
        self.products: dict[str, tuple[str, str]] = {}
        for node, _ in nodes:
            if node.op_type in ("Conv", "Gemm") and len(node.input) == 3 and node.input[2] in made:
                inputs, weight, bias = (made[name][1] for name in node.input)
                self.products[bias] = inputs, weight
        scales = sorted({node.input[1] for node, _ in pairs} - self.products.keys())
        self.growth = {name: torch.zeros_like(self.file[name]).requires_grad_() for name in scales}
        floats = {entry.name + _SUFFIX: numpy_helper.to_array(entry) for entry in plain.graph.initializer}
        self.units: dict[str, Tensor] = {}
        self.numbers: dict[str, Tensor] = {}
        for name in self.stored:
            known = torch.from_numpy(floats[name].copy()).to(device) if name in floats else self._dequantized(name)
            self.units[name] = self._largest(name, known)
            self.numbers[name] = (known / self.units[name]).requires_grad_()

    def __call__(self, images: Tensor) -> Tensor:
        scales = self._scales()
        return self.network(images, scales | {name: self._levels(name, scales) for name in self.stored})

    @torch.no_grad()
    def model(self) -> onnx.ModelProto:
        """The model as it is now, with whole levels."""
        found = self._scales()
        found |= {bias: found[inputs] * found[weight] for bias, (inputs, weight) in self.products.items()}
        found |= {name: self._levels(name, found).round() for name in self.stored}
        model = onnx.ModelProto()
        model.CopyFrom(self.network.model)
        for entry in model.graph.initializer:
            if entry.name in found:
                array = found[entry.name].to(self.file[entry.name].dtype).cpu().numpy()
                entry.CopyFrom(numpy_helper.from_array(array, entry.name))
        return model

    def _scales(self) -> dict[str, Tensor]:
        return {name: self.file[name] * growth.exp() for name, growth in self.growth.items()}

    def _levels(self, name: str, scales: dict[str, Tensor]) -> Tensor:
        """What is stored under a name, no further than the levels in the file go (onnxruntime may keep them to 7 bits);
        those of a bias, in 32 bits, are so fine that they are not rounded in training."""
        scale, zero, axis = self.stored[name]
        file, number = self.file[name], self.numbers[name] * self.units[name]
        size = self.maths.along(scales.get(scale, self.file[scale]), axis, number.ndim)
        if file.dtype == torch.int32:
            return number / size
        offset = self.maths.along(self.file[zero].float(), axis, number.ndim)
        return self.maths.Levels.apply(number, size, offset, float(file.min()), float(file.max()))

    def _dequantized(self, name: str) -> Tensor:
        scale, zero, axis = self.stored[name]
        return self.maths.dequantize({"axis": axis}, self.file[name], self.file[scale], self.file[zero])

    def _largest(self, name: str, number: Tensor) -> Tensor:
        """The largest absolute number of each channel, in a shape that divides `number`; of a bias, the largest."""
        scale, _, axis = self.stored[name]
        per_channel = self.file[scale].ndim > 0 and number.ndim > 1
        rest = [i for i in range(number.ndim) if not (per_channel and i == axis % number.ndim)]
        largest = number.abs().amax(rest, keepdim=True)
        return torch.where(largest > 0, largest, 1.0)


def _onnx_in_torch() -> ModuleType:
    """The module next to this file."""
    return importlib.import_module(".onnx_in_torch" if __package__ else "onnx_in_torch", __package__)
