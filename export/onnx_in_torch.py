"""An ONNX graph computed in torch, operator by operator, so that gradients reach its weights and its scales.

QuantizeLinear rounds and clips as a runtime does; gradients pass the rounding as if it were not there (Bengio et al.,
2013), which gives those of the scales as in LSQ (Esser et al., 2020). Needs torch, numpy and onnx.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor

_Attributes = dict[str, Any]


class Network:
    """The graph of a model as a function: images (B, C, H, W) -> logits (B, classes), both float32 on `device`.

    Raises RuntimeError, with their names, where there are operators that cannot be computed here.
    """

    def __init__(self, model: onnx.ModelProto, device: str = "cpu") -> None:
        if unknown := sorted({node.op_type for node in model.graph.node} - _OPERATORS.keys()):
            raise RuntimeError(f"torch cannot compute the network: okdc knows no {', '.join(unknown)} of ONNX yet.")
        self.model, self.graph = model, model.graph
        self.device = device
        self.stored = {entry.name: self._tensor(entry) for entry in model.graph.initializer}
        self.attributes = [
            {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
            for node in model.graph.node
        ]

    def __call__(self, images: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """The logits, with `values` for initializers of these names."""
        found: dict[str, Any] = {"": None, self.graph.input[0].name: images} | self.stored | dict(values or {})
        for node, attributes in zip(self.graph.node, self.attributes, strict=True):
            results = _OPERATORS[node.op_type](attributes, *[found[name] for name in node.input])
            several = isinstance(results, (tuple, list))
            found.update(zip(node.output, results if several else [results], strict=False))
        return found[self.graph.output[0].name]

    def _tensor(self, entry: onnx.TensorProto) -> Tensor:
        """Shapes stay on the CPU, where they are read."""
        tensor = torch.from_numpy(numpy_helper.to_array(entry).copy())
        return tensor if tensor.dtype == torch.int64 else tensor.to(self.device)


def along(scale: Tensor, axis: int, dimensions: int) -> Tensor:
    """A scale per channel in a shape that multiplies a tensor of so many dimensions; a single one as it is."""
    return scale if scale.ndim == 0 else scale.reshape([-1 if i == axis % dimensions else 1 for i in range(dimensions)])


class Levels(torch.autograd.Function):
    """round(x / scale) + offset, between low and high. Gradients pass where nothing is clipped, as without rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, low: Any, high: Any) -> Tensor:
        steps = x / scale
        ctx.save_for_backward(steps, scale, offset)
        ctx.limits = low, high
        return steps.round().add_(offset).clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps, scale, offset = ctx.saved_tensors
        low, high = ctx.limits
        inside = (steps >= low - offset) & (steps <= high - offset)
        gradient = torch.where(inside, gradients[0], 0.0).div_(scale)
        return gradient, (gradient * steps).sum_to_size(scale.shape).neg(), None, None, None


def _quantize(a: _Attributes, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Levels as float32."""
    limits, axis = torch.iinfo(zero.dtype), a.get("axis", 1)
    return Levels.apply(x, along(scale, axis, x.ndim), along(zero.float(), axis, x.ndim), limits.min, limits.max)


def dequantize(a: dict[str, Any], levels: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    axis = a.get("axis", 1)
    shifted = levels.float() if zero is None else levels.float() - along(zero.float(), axis, levels.ndim)
    return shifted * along(scale, axis, levels.ndim)


def _padded(x: Tensor, a: _Attributes, value: float) -> Tensor:
    """Images with the border that a convolution or a pooling asks for."""
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise RuntimeError(f"torch cannot compute the network: its padding is {a['auto_pad'].decode()}.")
    return _pad({}, x, a.get("pads", [0] * (2 * (x.ndim - 2))), value, list(range(2, x.ndim)))


def _pad(a: _Attributes, x: Tensor, pads: Any, value: Any = None, axes: Any = None) -> Tensor:
    if a.get("mode", b"constant") != b"constant":
        raise RuntimeError(f"torch cannot compute the network: it pads by {a['mode'].decode()}.")
    pads, axes = _list(pads), range(x.ndim) if axes is None else _list(axes)
    sides = {axis % x.ndim: pair for axis, *pair in zip(axes, pads, pads[len(pads) // 2 :], strict=False)}
    border = [side for axis in reversed(range(x.ndim)) for side in sides.get(axis, (0, 0))]
    return F.pad(x, border, value=0.0 if value is None else float(value)) if any(border) else x


def _conv(a: _Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    function: Any = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    ones = [1] * (x.ndim - 2)
    x = _padded(x, a, 0.0)
    return function(x, weight, bias, a.get("strides", ones), 0, a.get("dilations", ones), a.get("group", 1))


def _max_pool(a: _Attributes, x: Tensor) -> Tensor:
    function: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.ndim - 3]
    ones = [1] * (x.ndim - 2)
    x = _padded(x, a, -torch.inf)
    ceil = bool(a.get("ceil_mode", 0))
    return function(x, a["kernel_shape"], a.get("strides", ones), 0, a.get("dilations", ones), ceil)


def _average_pool(a: _Attributes, x: Tensor) -> Tensor:
    """The mean of what lies in the image, unless the border counts."""
    function: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
    window = a["kernel_shape"], a.get("strides", [1] * (x.ndim - 2)), 0, bool(a.get("ceil_mode", 0))
    mean = function(_padded(x, a, 0.0), *window)
    inside = torch.ones_like(x[:1, :1])
    return mean if a.get("count_include_pad", 0) else mean / function(_padded(inside, a, 0.0), *window)


def _gemm(a: _Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, weight = x.mT if a.get("transA") else x, weight.mT if a.get("transB") else weight
    product = a.get("alpha", 1.0) * (x @ weight)
    return product if bias is None else product + a.get("beta", 1.0) * bias


def _normalize(a: _Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[a.get("axis", -1) :]
    bias = None if bias is None else bias.expand(shape)
    return F.layer_norm(x, shape, scale.expand(shape), bias, a.get("epsilon", 1e-5))


def _batch_norm(a: _Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, a.get("epsilon", 1e-5))


def _reshape(a: _Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sides = _list(shape)
    return x.reshape([x.shape[i] if side == 0 and not a.get("allowzero") else side for i, side in enumerate(sides)])


def _slice(_: _Attributes, x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Tensor:
    parts = [slice(None)] * x.ndim
    each = itertools.count() if axes is None else _list(axes), itertools.repeat(1) if steps is None else _list(steps)
    for start, end, axis, step in zip(_list(starts), _list(ends), *each, strict=False):
        parts[axis] = slice(*slice(start, end, step).indices(x.shape[axis]))
    return x[tuple(parts)]


def _split(a: _Attributes, x: Tensor, sizes: Tensor | None = None) -> Any:
    axis = a.get("axis", 0)
    size = -(-x.shape[axis] // a["num_outputs"]) if sizes is None else _list(sizes)
    return x.split(size, axis)


def _gather(a: _Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    flat = indices.reshape(-1).to(x.device)
    found = x.index_select(axis, torch.where(flat < 0, flat + x.shape[axis], flat))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _squeeze(_: _Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_list(axes)))


def _unsqueeze(_: _Attributes, x: Tensor, axes: Tensor) -> Tensor:
    dimensions = x.ndim + len(_list(axes))
    for axis in sorted(axis % dimensions for axis in _list(axes)):
        x = x.unsqueeze(axis)
    return x


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(a: _Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        axis = list(range(x.ndim)) if axes is None else _list(axes)
        return function(x, dim=axis, keepdim=bool(a.get("keepdims", 1)))

    return reduce


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator without attributes."""
    return lambda _, *inputs: function(*inputs)


def _list(values: Any) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _type(number: int) -> torch.dtype:
    """torch's name for one of ONNX's types."""
    return torch.from_numpy(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(number))).dtype


_OPERATORS: dict[str, Callable[..., Any]] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": dequantize,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _plain(torch.matmul),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda _, x: x.mean(list(range(2, x.ndim)), keepdim=True),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "ReduceL2": _reduce(torch.linalg.vector_norm),
    "LayerNormalization": _normalize,
    "BatchNormalization": _batch_norm,
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "Relu": _plain(torch.relu),
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "Sigmoid": _plain(torch.sigmoid),
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": _plain(F.hardswish),
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", b"none").decode()),
    "Erf": _plain(torch.erf),
    "Tanh": _plain(torch.tanh),
    "Exp": _plain(torch.exp),
    "Log": _plain(torch.log),
    "Sqrt": _plain(torch.sqrt),
    "Reciprocal": _plain(torch.reciprocal),
    "Neg": _plain(torch.neg),
    "Clip": _plain(torch.clamp),
    "Add": _plain(torch.add),
    "Sub": _plain(torch.sub),
    "Mul": _plain(torch.mul),
    "Div": lambda _, x, y: x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc"),
    "Pow": _plain(torch.pow),
    "Min": lambda _, *x: torch.stack(torch.broadcast_tensors(*x)).amin(0),
    "Max": lambda _, *x: torch.stack(torch.broadcast_tensors(*x)).amax(0),
    "Equal": _plain(torch.eq),
    "Where": _plain(torch.where),
    "Identity": _plain(lambda x: x),
    "Cast": lambda a, x: x.to(_type(a["to"])),
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")]),
    "Range": _plain(torch.arange),
    "Expand": lambda _, x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(_list(shape)))),
    "Reshape": _reshape,
    "Flatten": lambda a, x: x.flatten(a.get("axis", 1)).flatten(0, a.get("axis", 1) - 1),
    "Transpose": lambda a, x: x.permute(a.get("perm") or list(range(x.ndim))[::-1]),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda a, *x: torch.cat(x, a["axis"]),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
}
